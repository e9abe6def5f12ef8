"""The comparison: names of methods, rows, the reference logits, the budget, mistakes in a configuration."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from configs import igq_vit as config_file
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.engine import evaluate, loop, parallel
from jaxvision.engine.datasets import build_data
from jaxvision.engine.options import Options
from jaxvision.engine.plan import Plan
from jaxvision.engine.progress import Progress
from jaxvision.main import make_task
from jaxvision.methods.igq_vit import allocation, bops, comparison, export, judging, report, simulate
from jaxvision.methods.igq_vit.calibration import Bits, Calibration
from jaxvision.methods.igq_vit.comparison import Bench, Row, Settings
from jaxvision.methods.igq_vit.sites import list_sites
from jaxvision.models import weight_file, zoo
from jaxvision.models.vit import ViT
from jaxvision.quant.weights import EPSILONS, WeightPolicy


def test_rows_keep_a_seed_together():
    rows = comparison.rows(2, ("W4A4", "W6A6"), ("minmax", "igq8"))
    assert [row.member for row in rows] == [0] * 4 + [1] * 4
    assert rows[1] == Row(0, "W4A4", "igq8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("igq", "did you mean 'igq"),
        ("minmx", "did you mean 'minmax'"),
        ("igq32", "config.igq.max_groups=16; raise it"),
        ("igq_alloc9", "lacks 9"),
        ("igq_alloc8_pow2", "use igq8_pow2"),
        (8, "config.methods=8 is unknown"),
    ],
)
def test_unknown_methods_are_named(name, message):
    with pytest.raises(ConfigError, match=message):
        comparison.check_method(name, Settings())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "igq_alloc8",
            {"candidates": (4, 8, 32)},
            r"candidates=\(4, 8, 32\) go beyond config.igq.max_groups=16; raise it",
        ),
        ("igq8", {"candidates": (0, 8)}, r"candidates=\(0, 8\) must be whole numbers of at least 1, each once"),
        ("kmeans8", {"max_groups": 4}, "'kmeans8', whose attention rows have 8 groups, but .*max_groups=4; raise it"),
    ],
)
def test_group_counts_that_cannot_be_are_named(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        comparison.check_method(name, Settings(**settings))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A4W4", "has 'A4W4', which must read like 'W4A4'"),
        (44, "has 44, which must read like"),
        ("W9A4", "has 'W9A4': weights.bits=9 must be at most 8"),
        ("W4A17", "has 'W4A17': bits.activation=17 must be a whole number from 1 to 16"),
    ],
)
def test_bits_are_parsed(text, message):
    assert comparison.parse_bits("W8A16", 8) == Bits(8, 16, 8)
    with pytest.raises(ConfigError, match=message):
        comparison.parse_bits(text, 8)


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        ("ptq4vit", "W4A1", "its twin quantizers need 2 bits or more"),
        ("igq8_pow2", "W4A8", "its shifted codes fit int8 up to 7 bits"),
        ("igq8_int", "W4A9", "its codes are int8"),
    ],
)
def test_a_method_that_does_not_exist_at_a_width_is_named(method, text, message):
    with pytest.raises(ConfigError, match=f"'{method}' and config.bits '{text}', but {message}; leave one"):
        comparison.check_widths(method, text, comparison.parse_bits(text, 8))
    comparison.check_widths(method, "W4A4", Bits(4, 4, 8))


class Batches:
    num_batches, batch_size = 2, 3

    def batch_at(self, index, shard_index=0, shard_count=1):
        return {"image": np.full((3, 1), index, np.float32), "mask": np.ones(3, np.float32)}


def test_reference_logits_are_computed_once():
    calls = []

    def predict(images):
        calls.append(images)
        return images * 2

    data = judging.WithReference(Batches(), predict)
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
    grouped, one_product = bench.build("igq8", bits).bops, bench.build("igq8_pow2", bits).bops
    assert one_product["bops/combine"] == one_product["bops/zero_point"] == 0 < grouped["bops/combine"]
    assert one_product["bops/index"] == grouped["bops/index"]
    assert list(bench.build("upper", bits).bops) == ["bops/base"]
    image = next(site for site in bench.context.sites if site.kind == "image")
    wide = bench.build("minmax", Bits(4, 4, 16)).bops["bops/base"] - bench.build("minmax", bits).bops["bops/base"]
    assert wide == np.prod(image.shape) * image.fan_out * 4 * 8


def test_one_program_judges_every_group_count_every_width_and_the_float_network(bench):
    """Uniform and allocated counts, other widths; the float network's accuracy comes out of the same program."""
    traces = []

    def apply_fn(*arguments, **options):
        traces.append(1)
        return bench.context.apply_fn(*arguments, **options)

    update = jax.jit(judging.judge(apply_fn))
    images, c = bench.context.images, bench.context
    reference = simulate.float_forward(c.apply_fn, c.variables, images)
    label = np.asarray(reference.argmax(-1)).copy()
    label[:2] = (label[:2] + 1) % 5
    batch = {"image": images, "label": label, "mask": np.ones(6, np.float32), "reference": reference}
    rows = [("igq2", 4), ("igq8", 4), ("igq_alloc4", 4), ("igq4_scale", 3), ("igq8_pow2", 4)]
    found = [update(bench.build(method, Bits(4, bits, 8)).network, batch) for method, bits in rows]
    assert len(traces) == 1
    assert len({float(each["kl"].compute()) for each in found}) == len(rows)
    np.testing.assert_allclose([each["float_accuracy"].compute() for each in found], 4 / 6, rtol=1e-6)


@pytest.mark.parametrize("method", ["igq4", "igq4_pow2"])
def test_rows_in_integers_equal_their_simulation(bench, method):
    c, bits = bench.context, Bits(4, 4, 8)
    update = jax.jit(judging.judge(c.apply_fn))
    simulated, integers = (bench.build(name, bits).network for name in (method, f"{method}_int"))
    reference = simulate.predict(
        c.apply_fn, simulated.variables, simulated.quantizers, simulate.switches(simulated.quantizers), c.images
    )
    batch = {"image": c.images, "label": np.zeros(6, int), "mask": np.ones(6, np.float32), "reference": reference}
    exact = float(
        np.mean(allocation.kl_divergence(simulate.float_forward(c.apply_fn, c.variables, c.images), reference))
    )
    assert float(update(integers, batch)["kl"].compute()) < 0.01 * exact
    assert integers.one_product == method.endswith("pow2")


def test_sequential_calibration_changes_later_sites_alone(bench):
    bits, sequential = Bits(3, 3, 8), Bench(bench.context, replace(bench.settings, sequential=True))
    parallel_made, made = (each.build("igq4", bits).network.quantizers for each in (bench, sequential))
    assert set(parallel_made) == set(made)
    np.testing.assert_array_equal(parallel_made["patch_embed.proj"].scale, made["patch_embed.proj"].scale)
    late = "blocks.0.mlp.fc2"
    assert made[late].bounds.shape == parallel_made[late].bounds.shape
    assert not np.allclose(made[late].bounds, parallel_made[late].bounds, rtol=1e-3)


@pytest.mark.parametrize("sequential", [False, True])
def test_the_head_in_fixed_groups(bench, sequential):
    """Groups of calibrated ranges err less than one quantizer; nothing but the classifier's input changes."""
    settings, bits = replace(bench.settings, sequential=sequential), Bits(4, 4, 8)
    grouped = Bench(replace(bench.context, head_groups=3), settings)
    whole, made = (each.build("igq4", bits).network.quantizers for each in (Bench(bench.context, settings), grouped))
    assert made["head"].scale.shape == (16,) and len(np.unique(made["head"].scale)) <= 3
    for name in set(made) - {"head"}:
        jax.tree.map(np.testing.assert_array_equal, made[name], whole[name])
    x = bench.context.activations["head"]
    error = lambda quantizer: float(np.square(quantizer(x, 6) - x).mean())  # noqa: E731
    if not sequential:
        each = Bench(replace(bench.context, head_groups=16), settings).build("igq4", bits).network.quantizers["head"]
        assert error(each) < error(made["head"]) < error(whole["head"])
    combine = grouped.build("igq4", bits).bops["bops/combine"] - bench.build("igq4", bits).bops["bops/combine"]
    assert combine == 2 * 5 * (32**2 + 32)
    ptq4vit = [each.build("ptq4vit", bits).bops for each in (bench, grouped)]
    assert ptq4vit[0] == ptq4vit[1]


def test_whole_numbers_are_logged_exactly():
    cost = 12_345_678_901
    (number,) = evaluate.compute({"bops/base": judging.Exact.of(cost)}).values()
    assert number == cost and json.dumps(number) == str(cost)


def test_the_percentile_is_chosen_by_one_program(bench):
    traces = []

    def apply_fn(*arguments, **options):
        traces.append(1)
        return bench.context.apply_fn(*arguments, **options)

    context = replace(bench.context, apply_fn=apply_fn, weight_policy=WeightPolicy(method="percentile"))
    first, second = (comparison.choose_epsilon(context, Bits(width, 4, 8)) for width in (2, 8))
    assert len(traces) == 1
    assert {first.weight_policy.epsilon, second.weight_policy.epsilon} <= set(EPSILONS)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("methods", ("minmx",), "did you mean 'minmax'"),
        ("methods", (), r"config.methods=\(\) must be a tuple of at least one name, each once"),
        ("methods", ("igq8", "igq8"), "config.methods=.* each once"),
        ("methods", (8,), "config.methods=8 is unknown"),
        ("bits", (), r"config.bits=\(\) must be a tuple"),
        ("bits", ("4",), "must read like 'W4A4'"),
        ("bits", (44,), "config.bits has 44"),
        ("bits", ("W9A4",), "config.bits has 'W9A4'"),
        ("head_groups", -1, "config.head_groups=-1"),
        ("image_bits", 17, "config.image_bits=17 must be a whole number from 1 to 16"),
        ("igq.max_groups", 4, "max_groups=4; raise it"),
        ("igq.candidates", (4, 8, 32), "go beyond config.igq.max_groups=8; raise it"),
        ("train.epochs", 0.0, "say config.train.random_weights=True to quantize a random network"),
        ("train.random_weights", True, "config.train.random_weights=True contradicts config.train.epochs=0.2"),
        ("model.name", "resnet18", "'resnet18' is no vision transformer"),
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
        if path == "model.name":
            config.model.settings = {}
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
        config.seeds = (0,)
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
    # The float network is in the table, and its accuracy is that of the file's weights.
    examples = build_data(config.data, 0, zoo.spec("deit_tiny_patch16_224")).eval
    batches = [examples.batch_at(index) for index in range(examples.num_batches)]
    right = sum(
        float(
            np.sum(batch["mask"] * (np.asarray(module.apply(variables, batch["image"])).argmax(-1) == batch["label"]))
        )
        for batch in batches
    )
    assert made.summary["float/accuracy"] == pytest.approx(right / 16)
    name, accuracy, *rest = made.tables[0].rows[0]
    assert (name, accuracy) == ("float", f"{100 * right / 16:.1f}") and set(rest) == {"-"}
    assert any(note == f"Float accuracy of the seeds (0,): {accuracy} %." for note in made.notes)
    drawn = json.loads(made.files["calibration.json"])
    assert list(drawn) == ["seed 0"] and len(set(drawn["seed 0"])) == 4 and max(drawn["seed 0"]) < 24
    assert list(json.loads(made.files["groups.json"])["igq_alloc8"]["W4A4"]) == ["seed 0"]
    assert any("chosen on the calibration images" in note and "% at W4A4" in note for note in made.notes)
    made.files["quantized.safetensors"](run / "quantized.safetensors")
    loaded = export.load(run / "quantized")
    assert loaded.model["model"] == "deit_tiny_patch16_224" and loaded.model["num_classes"] == 2
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
    assert Plan(task, Options(), parallel.create("jit")).states[0].params["pos_embed"].shape == (5, 1, 197, 192)


def test_measurements_that_are_not_finite_are_said_in_the_table():
    times = {"seconds/calibrate": 1.0, "seconds/evaluate": 1.0}
    cost = {"bops/base": 10, "bops/index": 0, "bops/combine": 5}
    whole = {"accuracy": 0.5, "kl": 1.0, "agreement": 0.5, "float_accuracy": 0.75, **cost, **times}
    found = {
        Row(member, "W4A4", method): dict(whole) for member in range(3) for method in ("minmax", "igq8", "upper", "ema")
    }
    found[Row(1, "W4A4", "igq8")]["kl"] = None
    for member in range(3):
        found[Row(member, "W4A4", "ema")]["kl"] = None
        del found[Row(member, "W4A4", "upper")]["bops/index"], found[Row(member, "W4A4", "upper")]["bops/combine"]
    methods = ("minmax", "igq8", "upper", "ema")
    rows = {row[0]: row[1:] for row in report.accuracy_table(found, methods, "W4A4").rows}
    assert rows["float"][0] == "75.0 ± 0.0"
    assert rows["minmax"][1] == "1.000 ± 0.000" and rows["igq8"][1] == "1.000 ± 0.000 (2 of 3 seeds)"
    assert rows["ema"][1] == "0 of 3 seeds"
    assert rows["minmax"][4:6] == ("-", "50.0") and rows["upper"][4:6] == ("n/a", "n/a")
    summary = report.summarize(found, methods, ("W4A4",))
    assert "W4A4/ema/kl" not in summary and summary["W4A4/igq8/kl"] == 1.0 and summary["float/accuracy"] == 0.75
    json.dumps(summary, allow_nan=False)


def test_the_sqnr_is_measured_on_images_of_all_classes(tmp_path):
    """A folder's examples lie class by class: the first ones would be of one class."""
    config = config_file.get_config("imagenet_deit_t")
    with config.unlocked():
        config.data.path, config.data.batch_size = str(imagenet_like(tmp_path / "images")), 4
        config.model.settings = {"depth": 1}
        config.train.epochs, config.calibration.images, config.calibration.sqnr_images = 1.0, 4, 6
    task = make_task(Config(config))
    comparer = task.report.args[0]
    labels = comparer._sqnr_data.batch_at(0)["label"]
    assert set(labels.tolist()) == {0, 1} and len(labels) == 6
    again = make_task(Config(config)).report.args[0]
    np.testing.assert_array_equal(again._sqnr_data.batch_at(0)["image"], comparer._sqnr_data.batch_at(0)["image"])
