"""What one image costs: against the oracles' sums and by hand, and every mistake in one sentence."""

import pytest

from jaxvision.quant.bops import Widths
from jaxvision.tools import count

SMALL = '{"depth": 8, "width_multiplier": 0.25}'


def test_bit_operations_by_hand():
    """The middle layers at W4 A3 G5; the first and the last in float."""
    cost = count.measure("resnet20", (8, 8, 3), 5, Widths(4, 3, 5), depth=8, width_multiplier=0.25)
    # Widths 4, 8, 16 on 8x8, 4x4, 2x2 pixels; the shortcuts have no weights.
    middle = 64 * 2 * 9 * 16 + 16 * 9 * (4 * 8 + 8 * 8) + 4 * 9 * (8 * 16 + 16 * 16)
    ends = 64 * 9 * 3 * 4 + 16 * 5
    assert cost.macs == middle + ends
    assert cost.bops("forward") == 12 * middle + 1024 * ends
    assert cost.bops("training") == (12 + 20 + 15) * middle + 3 * 1024 * ends
    everything = count.measure("resnet20", (8, 8, 3), 5, Widths(4, 3, 5), ends=True, depth=8, width_multiplier=0.25)
    assert everything.bops("training") == 47 * (middle + ends)
    kernels, norms, classifier = 108 + 288 + 864 + 3456, 2 * (4 + 2 * (4 + 8 + 16)), 85
    assert cost.parameters == kernels + norms + classifier


def test_the_command_prints_a_line_a_network_and_its_layers(capsys):
    arguments = ["--model", "resnet20", "--classes", "5", "--image", "8", "8", "3", "--settings", SMALL]
    assert count.main([*arguments, "--bits", "4", "3", "--layers"]) == 0
    head, line, _, *layers = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["network", "image"] and line.split()[:2] == ["resnet20", "8x8x3"]
    assert line.split()[4] == "4/3/32"
    assert layers[1].split()[0] == "conv1/kernel" and layers[1].split()[3] == "32/32/32"
    assert layers[2].split()[3] == "4/3/32" and layers[-1].startswith("total")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet21"], "model='resnet21' is unknown; did you mean 'resnet"),
        (["--model", "resnet20", "--bits", "4"], r"--bits=(4,) must be two or three widths"),
        (["--model", "resnet20", "--bits", "4", "9"], "input_bits=9 must be a whole number from 1 to 8"),
        (["--model", "resnet20", "--settings", "{"], "--settings='{' is not JSON"),
        (["--model", "resnet20", "--settings", "[]"], "--settings='[]' must be a JSON object"),
        (["--model", "resnet20", "--image", "8", "0", "3"], "--image=(8, 0, 3) must be three whole numbers"),
        (["--layers"], "--layers and --settings are for one network; name it with --model"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, capsys):
    assert count.main(arguments) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
