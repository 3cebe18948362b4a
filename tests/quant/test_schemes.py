"""Schemes: names, shapes and bytes."""

from typing import Any

import pytest

from tiered.errors import ConfigError
from tiered.quant import CODEBOOKS, CodebookScheme, GroupScheme, Scheme

SIZES = (32, 64, 128)
ALL: list[Scheme] = [GroupScheme(bits, group_size) for bits in (4, 8) for group_size in SIZES]
ALL += [CodebookScheme(codebook, group_size) for codebook in CODEBOOKS for group_size in SIZES]


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_a_scheme_is_what_its_name_parses_to(scheme: Scheme) -> None:
    assert Scheme.parse(scheme.name) == scheme


def test_a_name_without_a_group_size_means_64() -> None:
    assert Scheme.parse("int8") == GroupScheme(bits=8, group_size=64)
    assert GroupScheme.parse("int4-g64").name == "int4-g64"


@pytest.mark.parametrize("name", ["", "int4-", "int4-g", "INT4", "int3-g64", "int4-g48", "nf4", "nf4-g16", "int4-g64 "])
def test_parse_refuses_a_name_it_does_not_know(name: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Scheme.parse(name)


@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (4, 48), (4.0, 64), ("4", 64), (4, True)])
def test_bits_and_group_sizes_without_a_layout_are_refused(bits: Any, group_size: Any) -> None:
    with pytest.raises(ConfigError, match="expected"):
        GroupScheme(bits, group_size)


def test_shapes_and_bytes() -> None:
    int4, int8 = GroupScheme(4), GroupScheme(8)
    assert int4.q_shape(3, 128) == (3, 64)
    assert int8.q_shape(3, 128) == (3, 128)
    assert int4.scale_shape(3, 128) == int4.zero_shape(3, 128) == (3, 2)
    assert int4.nbytes(1, 64) == 35
    assert int8.nbytes(1, 64) == 67
    assert int4.nbytes(12288, 12288) == 12288 * 12288 // 64 * 35
    assert [scheme.nbytes(1, 64) for scheme in map(Scheme.parse, ("mxfp4-g32", "nf4-g64", "iq4nl-g32"))] == [34, 36, 36]
    assert Scheme.parse("nf4-g64").zero_shape(3, 128) == (3, 0)
    assert [*Scheme.parse("nf4-g64").parts(3, 128)] == ["q", "scale"]


@pytest.mark.parametrize(("out_features", "in_features"), [(4, 100), (4, 0), (0, 64), (4, 32)])
def test_a_shape_that_does_not_fit_is_refused_by_name(out_features: int, in_features: int) -> None:
    scheme = GroupScheme(4)
    assert not scheme.accepts(out_features, in_features)
    with pytest.raises(ConfigError, match=r"int4-g64 expects `in`"):
        scheme.nbytes(out_features, in_features)
