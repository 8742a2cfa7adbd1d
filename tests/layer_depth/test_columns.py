"""Which columns are compared: stages within a width, poolings that suit, in execution order."""

from types import SimpleNamespace

import pytest

from featurepipe.backbones import load_backbone
from featurepipe.errors import UsageError
from featurepipe.layer_depth.study import choose_columns, columns_of_space


@pytest.fixture(scope="module")
def network():
    known = {}

    def load(name):
        return known.setdefault(name, load_backbone(name, "none"))

    return load


def names(columns):
    return [column.column for column in columns]


AUTO = {
    ("lenet5", 9000): ["s2:avg14x14", "s4:avg5x5", "c5:gap", "f6.1:gap"],
    ("lenet5", 400): ["s2:avg8x8", "s4:avg5x5", "c5:gap", "f6.1:gap"],
    ("resnet50", 9000): ["layer1:avg5x5", "layer2:avg4x4", "layer3:avg2x2", "layer4:avg2x2", "flatten:gap"],
}


@pytest.mark.parametrize(("name", "width"), AUTO)
def test_auto_is_the_stages_each_with_the_finest_grid_that_fits(network, name, width):
    assert names(choose_columns(network(name), "auto", None, width)) == AUTO[name, width]


@pytest.mark.parametrize("name", ["resnet50", "vgg16", "lenet5", "efficientnet_lite0"])
@pytest.mark.parametrize("most", [9000, 1500])
def test_auto_is_bounded_ordered_and_as_the_network_says(network, name, most):
    backbone = network(name)
    found = choose_columns(backbone, "auto", None, most)
    assert [backbone.node(column.node).name for column in found] == [
        backbone.node(stage).name for stage in backbone.stages()
    ]
    order = [info.name for info in backbone.nodes()]
    for column in found:
        info = backbone.node(column.node)
        assert (column.depth, column.cost) == (order.index(info.name), info.cost)
        (parsed,) = backbone.columns([column.column])
        (width,) = backbone.feature_shape(parsed)
        assert column.width == width
        assert width <= most or column.pooling == "gap"
        if column.pooling.startswith("avg"):  # one cell more a side would be too wide, or finer than the map
            side = int(column.pooling.split("x")[-1])
            assert info.width * (side + 1) ** 2 > most or side == min(info.shape[1:])
    assert [column.depth for column in found] == sorted(column.depth for column in found)
    assert [column.cost for column in found] == sorted(column.cost for column in found)


def test_poolings_are_given_to_each_node_that_can_have_them(network):
    found = names(choose_columns(network("lenet5"), ["c1", "s4", "f6"], ["gap", "avg8x8", "avg2x2"], 9000))
    # c1 has 6 maps of 28 x 28, s4 16 of 5 x 5, f6 84 values
    assert found == ["c1:gap", "c1:avg2x2", "c1:avg8x8", "s4:gap", "s4:avg2x2", "f6:gap"]


def test_a_grid_need_not_be_square(network):
    found = choose_columns(network("lenet5"), ["s4", "f6"], ["avg5x2", "avg6x1", "max1x6"], 9000)
    assert names(found) == ["s4:avg5x2", "f6:gap"]
    assert [column.width for column in found] == [160, 84]


def test_nodes_may_have_poolings_of_their_own(network):
    found = names(choose_columns(network("lenet5"), ["f6", "c3:gmp", "c3", "s2:avg3x3"], ["gap"], 9000))
    assert found == ["s2:avg3x3", "c3:gap", "c3:gmp", "f6:gap"]


def test_columns_are_in_execution_order_then_by_width(network):
    found = choose_columns(network("lenet5"), ["f6", "c5", "c1:avg4x4", "c1:gap", "s4"], None, 9000)
    assert names(found) == ["c1:gap", "c1:avg4x4", "s4:avg5x5", "c5:gap", "f6:gap"]
    assert [column.width for column in found] == [6, 96, 400, 120, 84]


def test_a_column_named_twice_is_compared_once(network):
    found = choose_columns(network("lenet5"), ["c3", "bottleneck", "f6.1:gap", "c3", "f6"], ["gap"], 9000)
    assert names(found) == ["c3:gap", "f6:gap"]


def test_columns_that_are_too_wide_are_left_out(network):
    found = names(choose_columns(network("lenet5"), ["c1", "c3:gap", "f6"], ["flatten", "gap"], 1000))
    assert found == ["c1:gap", "c3:gap", "f6:gap"]
    with pytest.raises(UsageError, match=r"c1:flatten has 4,704 values an image, more than max_width=1000 allows"):
        choose_columns(network("lenet5"), ["c1:flatten", "c3:gap", "f6"], None, 1000)


def test_auto_may_stand_beside_nodes(network):
    found = names(choose_columns(network("lenet5"), ["auto", "c3:gmp"], None, 9000))
    assert set(found) - set(names(choose_columns(network("lenet5"), "auto", None, 9000))) == {"c3:gmp"}


def test_one_column_is_no_comparison(network):
    lenet = network("lenet5")
    with pytest.raises(UsageError, match=r"two columns or more, and 1 of f6:gap \(84\) is at most max_width=9000"):
        choose_columns(lenet, ["f6"], None, 9000)
    with pytest.raises(UsageError, match=r"and 0 of c1:avg4x4 \(96\), s4:avg4x4 \(256\) are at most max_width=50 wide"):
        choose_columns(lenet, ["c1", "s4"], ["avg4x4"], 50)


def test_a_pooling_too_fine_for_every_node_is_refused(network):
    with pytest.raises(UsageError, match="two columns or more, and no node has such a pooling; name more nodes"):
        choose_columns(network("lenet5"), ["c1", "s4"], ["avg40x40"], 9_000_000)


def test_unknown_nodes_and_poolings_are_refused(network):
    with pytest.raises(UsageError, match="unknown node 'c9' in lenet5"):
        choose_columns(network("lenet5"), ["c9", "f6"], None, 9000)
    with pytest.raises(UsageError, match="unknown pooling 'average'"):
        choose_columns(network("lenet5"), ["c1", "f6"], ["average"], 9000)
    with pytest.raises(UsageError, match="unknown pooling 'avg0x2'"):
        choose_columns(network("lenet5"), ["c1:avg0x2", "f6"], None, 9000)
    with pytest.raises(UsageError, match="max_width 0 must be a number from 1"):
        choose_columns(network("lenet5"), "auto", None, 0)


def test_a_store_whose_columns_are_all_too_wide():
    held = {"c1:avg4x4": SimpleNamespace(width=96), "f6:gap": SimpleNamespace(width=84)}
    space = SimpleNamespace(name="lenet5-1", columns=lambda: held)
    assert columns_of_space(load_backbone("lenet5", "none"), space, 84) == ["f6:gap"]
    with pytest.raises(
        UsageError, match=r"every column of lenet5-1 is wider than max_width=50 allows: c1:avg4x4 \(96\), f6"
    ):
        columns_of_space(load_backbone("lenet5", "none"), space, 50)
