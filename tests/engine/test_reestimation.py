"""Re-estimated batch statistics: a stage that averages them with frozen weights, for every member of an arm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, Preempted
from jaxvision.engine import arms, loop, parallel, reestimation, supervised
from jaxvision.engine.options import Options
from jaxvision.engine.progress import Progress
from jaxvision.engine.report import Report, Results
from jaxvision.engine.task import State, Task
from jaxvision.metrics import Mean
from jaxvision.models.layers import BatchNorm
from tests.engine.tiny import StopAt

SEEDS, STEPS, BATCHES = (3, 8), 2, 3


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        factor = self.param("factor", nn.initializers.ones, ())
        return BatchNorm(name="norm")(factor * x, train=train)


class Rows:
    """Batches that differ from step to step and from seed to seed."""

    batch_size, num_batches = 4, 1

    def __init__(self, seed):
        self.seed = seed

    def batch_at(self, step, shard_index=0, shard_count=1):
        return {"image": np.random.default_rng((self.seed, step)).normal(step, 1, (4, 2)).astype(np.float32)}


def begin(variables, setting, key):
    del setting, key
    stats = {name: tree for name, tree in variables.items() if name != "params"}
    return State(jnp.zeros((), jnp.int32), variables["params"], stats)


def train(state, batch, key):
    """The factor becomes lr."""
    del key
    lr = state.extra[arms.SETTING]["lr"]
    _, stats = Net().apply(supervised.variables(state), batch["image"], train=True, mutable=["batch_stats"])
    return state.replace(params={**state.params, "factor": lr}, model_state=stats), {"size": Mean.of(batch["image"])}


def evaluate(state, batch):
    del batch
    return {"mean": Mean.of(state.model_state["batch_stats"]["norm"]["mean"])}


ARMS = [arms.Arm(name, begin, train, STEPS, evaluate, grid={"lr": (2.0, 5.0)}) for name in ("one", "other")]


def task(batches=BATCHES, how="map"):
    data, evals = [Rows(seed) for seed in SEEDS], {"test": Rows(0)}
    made = []
    for index, stage in enumerate(arms.stages(ARMS, SEEDS, data, evals, how=how)):
        made += reestimation.stages(
            stage, ARMS[index], Net(), SEEDS, data, evals,
            batches=batches, first=index * (STEPS + batches) + STEPS, how=how,
        )  # fmt: skip
    init = lambda key: arms.start_state(lambda key: Net().init(key, jnp.zeros((1, 2))), SEEDS, key)  # noqa: E731
    return Task("tiny", init, tuple(made), lambda results: Report("tiny"))


def run(directory, interrupt=None, **options):
    directory.mkdir(exist_ok=True)
    chosen = Options(log_every=1, tensorboard=False)
    devices, progress = parallel.create("jit"), Progress(False)
    return loop.run(task(**options), chosen, directory, devices, progress, interrupt=interrupt)


def expected(seed, lr):
    batches = [lr * Rows(seed).batch_at(step)["image"].astype(np.float64) for step in range(BATCHES)]
    return np.mean([batch.mean(0) for batch in batches], 0), np.mean([batch.var(0, ddof=1) for batch in batches], 0)


@pytest.mark.parametrize("how", ["map", "vmap", "call"])
def test_statistics_are_the_mean_over_the_first_batches_of_each_members_seed(how, tmp_path):
    results = run(tmp_path, how=how)
    assert [stage.name for stage in task().stages] == ["one", "one_statistics", "other", "other_statistics"]
    state = results.state
    for index, member in enumerate(ARMS[1].members(SEEDS)):
        lr = member.setting["lr"]
        mean, var = expected(SEEDS[member.seed], lr)
        np.testing.assert_allclose(state.params["factor"][index], lr)
        np.testing.assert_allclose(state.model_state["batch_stats"]["norm"]["mean"][index], mean, rtol=1e-5)
        np.testing.assert_allclose(state.model_state["batch_stats"]["norm"]["var"][index], var, rtol=1e-5)
        # The first arm was judged with such statistics too, and with the running ones before.
        after = results.last("one_statistics", "test", f"mean_{index}")
        np.testing.assert_allclose(after, mean.mean(), rtol=1e-5)
        assert abs(results.last("one", "test", f"mean_{index}") - after) > 0.1
    assert len(results.curve("one_statistics", "statistics_change")[0]) == BATCHES


def test_stopped_in_the_middle_it_goes_on_where_it_was(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(Preempted, match=f"at step {STEPS + 1} "):
        run(tmp_path / "cut", StopAt(STEPS + 2))  # the evaluation between the stages asks once
    again = run(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole.state, again.state)
    assert whole.rows == again.rows


def test_without_batches_there_is_no_such_stage():
    assert [stage.name for stage in task(batches=0).stages] == ["one", "other"]
    assert (reestimation.judged("one", 0), reestimation.judged("one", 5)) == ("one", "one_statistics")


@pytest.mark.parametrize(
    ("batches", "variables", "message"),
    [
        (-1, {"batch_stats": {"a": 0}}, "config.reestimate_batches=-1 must be a number of at least 0"),
        (0.5, {"batch_stats": {"a": 0}}, "config.reestimate_batches=0.5 must be a whole number of batches"),
        (3, {"params": {}}, "config.reestimate_batches=3, but the network has no batch normalisation"),
    ],
)
def test_mistakes_in_the_field(batches, variables, message):
    with pytest.raises(ConfigError, match=message):
        reestimation.count(Config({"reestimate_batches": batches}), variables)
    assert reestimation.count(Config({"reestimate_batches": 0}), {"params": {}}) == 0


def test_the_note_tells_what_the_running_statistics_gave(tmp_path):
    row = {"step": 2, "stage": "one", "kind": "eval", "eval": "test", "accuracy_0": 0.5, "accuracy_2": 0.7}
    text = reestimation.note(Results(None, [row], [], tmp_path), {"mine": ("one", (0, 2))}, "accuracy", "test", 9)
    assert "over 9 training batches" in text and "mine 60.0 ± 14.1" in text
