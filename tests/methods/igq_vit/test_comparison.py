"""The comparison: names of methods, rows, the reference logits, the budget, mistakes in a configuration."""

import jax
import numpy as np
import pytest
from PIL import Image

from configs import igq_vit as config_file
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.engine import loop, parallel
from jaxvision.engine.options import Options
from jaxvision.engine.plan import Plan
from jaxvision.engine.progress import Progress
from jaxvision.main import make_task
from jaxvision.methods.igq_vit import bops, comparison, export, simulate
from jaxvision.methods.igq_vit.calibration import Bits, Calibration
from jaxvision.methods.igq_vit.comparison import Bench, Settings
from jaxvision.methods.igq_vit.sites import list_sites
from jaxvision.models import weight_file, zoo
from jaxvision.models.vit import ViT


def test_rows_keep_a_seed_together():
    rows = comparison.rows(2, ("W4A4", "W6A6"), ("minmax", "igq8"))
    assert [row.member for row in rows] == [0] * 4 + [1] * 4
    assert str(rows[1]) == "igq8 W4A4 seed 0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("igq", "did you mean 'igq"),
        ("minmx", "did you mean 'minmax'"),
        ("igq32", "config.igq.max_groups=16; raise it"),
        ("igq_alloc9", "lacks 9"),
    ],
)
def test_unknown_methods_are_named(name, message):
    with pytest.raises(ConfigError, match=message):
        comparison.check_method(name, Settings())


def test_bits_are_parsed():
    assert comparison.parse_bits("W4A3", 8) == Bits(4, 3, 8)
    with pytest.raises(ConfigError, match="has 'A4W4', which must read like W4A4"):
        comparison.parse_bits("A4W4", 8)


class Batches:
    num_batches, batch_size = 2, 3

    def batch_at(self, index, shard_index=0, shard_count=1):
        return {"image": np.full((3, 1), index, np.float32), "mask": np.ones(3, np.float32)}


def test_reference_logits_are_computed_once():
    calls = []

    def predict(images):
        calls.append(images)
        return images * 2

    data = comparison.WithReference(Batches(), predict)
    for _ in range(3):
        np.testing.assert_array_equal(data.batch_at(1)["reference"], np.full((3, 1), 2.0))
    assert len(calls) == 1


@pytest.fixture(scope="module")
def bench():
    module = ViT(num_classes=5, patch_size=4, width=16, depth=1, num_heads=2)
    images = np.random.default_rng(0).normal(size=(6, 16, 16, 1)).astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), images)
    settings = Settings(max_groups=8, candidates=(2, 4, 8))
    return Bench(Calibration.create(module.apply, variables, images), settings)


def test_allocation_stays_within_the_budget_and_does_no_worse(bench):
    bits = Bits(4, 4, 8)
    built = bench.build("igq_alloc4", bits)
    cost = bops.cost_table(bench.context.sites, bench.settings.candidates, 4, 4)
    index = [bench.settings.candidates.index(count) for count in built.groups.values()]
    chosen = sum(cost[site, i] for site, i in enumerate(index))
    assert chosen <= cost[:, 1].sum()
    psi = bench.perturbations(bits, 4)
    assert psi[np.arange(len(psi)), index].sum() <= psi[:, 1].sum() + 1e-12


def test_every_method_builds_and_more_bits_err_less(bench):
    c = bench.context

    def error(method, bits):
        network = bench.build(method, bits).network
        on = simulate.switches(network.quantizers)
        exact = simulate.predict(c.apply_fn, c.variables, network.quantizers, simulate.switches(on, False), c.images)
        return np.abs(simulate.predict(c.apply_fn, network.variables, network.quantizers, on, c.images) - exact).mean()

    for method in ("igq4", "igq4_scale", "igq_alloc4", "kmeans8", "upper"):
        assert error(method, Bits(8, 8, 8)) < error(method, Bits(3, 3, 8)), method


def test_costs_of_a_baseline_hold_what_its_grouping_needs(bench):
    bits = Bits(4, 4, 8)
    kmeans, vsquant = bench.build("kmeans8", bits).bops, bench.build("vsquant8", bits).bops
    assert kmeans["bops/combine"] == vsquant["bops/combine"] > 0
    assert kmeans["bops/zero_point"] == 0 < vsquant["bops/zero_point"]
    assert bench.build("minmax", bits).bops["bops/combine"] == 0


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("methods", ("minmx",), "did you mean 'minmax'"),
        ("bits", ("4",), "must read like W4A4"),
        ("seeds", (0, 0), "must be at least one seed, each once"),
        ("calibration.images", 5000, "is more than the 1297 of the training split"),
        ("igq.m_step", "median", "config.igq.m_step='median' is not one of"),
        ("export.method", "minmax", "must name an IGQ method"),
        ("weights.method", "entropy", "weights.method='entropy' is unknown"),
    ],
)
def test_mistakes_in_a_configuration_are_found_before_anything_runs(path, value, message):
    config = config_file.get_config("smoke")
    with config.unlocked():
        config.update_from_flattened_dict({path: value})
    with pytest.raises(ConfigError, match=message):
        make_task(Config(config))


def imagenet_like(directory):
    """Forty generated photographs in two classes and two splits."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8)):
        for name in ("n01", "n02"):
            folder = directory / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (40, 52, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    return directory


def test_the_imagenet_path_runs_on_a_folder_and_a_weights_file(tmp_path):
    """The real protocol, on a small network: weights from a file, photographs from a folder, percentile weights."""
    settings = {"depth": 1, "width": 32, "num_heads": 2}
    module = zoo.build("deit_tiny_patch16_224", num_classes=2, **settings)
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    weights = tmp_path / "weights.safetensors"
    weight_file.save_variables(weights, variables, {"model": "deit_tiny_patch16_224", "num_classes": 2})
    config = config_file.get_config("imagenet_deit_t")
    with config.unlocked():
        config.model.settings = settings
        config.model.init_from = str(weights)
        config.data.path, config.data.size = str(imagenet_like(tmp_path / "images")), 32
        config.data.batch_size, config.data.eval_batch_size = 4, 12
        config.methods, config.bits, config.tensorboard = ("minmax", "igq_alloc8"), ("W4A4",), False
        config.calibration.images, config.calibration.sqnr_images = 4, 8
    config = Config(config)
    options = Options.read(config)
    task = make_task(config)
    config.check_all_read()
    assert [stage.name for stage in task.stages] == ["quantize"]
    run = tmp_path / "run"
    run.mkdir()
    results = loop.run(task, options, run, parallel.create("jit"), Progress(False))
    np.testing.assert_array_equal(results.state.params["head"]["kernel"], variables["params"]["head"]["kernel"])
    assert len(results.rows) == 2
    made = task.report(results)
    assert any("chosen on the calibration images" in note and "% at W4A4" in note for note in made.notes)
    made.files["quantized.safetensors"](run / "quantized.safetensors")
    loaded = export.load(run / "quantized")
    assert set(loaded.codes) >= {"blocks_0/attn/qkv/kernel", "head/kernel"}


@pytest.mark.parametrize("preset", [name for name in config_file.PRESETS if name != "smoke"])
def test_presets_shape_at_full_size(preset, tmp_path_factory):
    """Every ImageNet preset's network, its sites and their costs, without allocating anything."""
    name = config_file.IMAGENET[preset]
    module = zoo.build(name, num_classes=1000)
    size = zoo.spec(name).input_size
    shapes = zoo.variable_shapes(module, size)
    found = list_sites(module.apply, shapes, (*size, 3))
    per_block = 5 * sum(1 for site in found if site.kind == "rows")
    merging = sum(1 for site in found if site.name.endswith("reduction"))
    assert sum(1 for site in found if site.grouped) == per_block + merging
    cost = bops.cost_table(found, Settings().candidates, 4, 4)
    assert (np.diff(cost, axis=1) > 0).all()


def test_an_untrained_imagenet_preset_plans_its_training(tmp_path):
    """Without a weights file the same configuration trains first; its shapes fit together."""
    config = config_file.get_config("imagenet_deit_t")
    with config.unlocked():
        config.data.path, config.data.batch_size = str(imagenet_like(tmp_path / "images")), 4
        config.model.settings = {"depth": 1}
        config.train.epochs, config.calibration.images = 1.0, 4
    task = make_task(Config(config))
    assert [stage.name for stage in task.stages] == ["train", "quantize"]
    assert Plan(task, Options(), parallel.create("jit")).states[0].params["pos_embed"].shape == (1, 1, 197, 192)
