"""Names of many shards, and the counts beside them: quick and small, and equal to the plain way."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.shardlists import expand_urls

from mmpretrain.data.schema import ShardError
from mmpretrain.data.shard_names import Joined, _count_names, _range, expand, expand_braces, in_order

RANGES = st.builds(lambda first, count: (first, first + count), st.integers(0, 120), st.integers(0, 30))


@given(RANGES, st.booleans(), st.sampled_from(["", "/x"]))
def test_lazy_names_are_the_names(span, padded, tail):
    """A remote brace range is not written out, and is what writing it out gives."""
    width = 3 if padded else 0
    spec = f"s3://bucket/a{{{span[0]:0{width}d}..{span[1]:0{width}d}}}{tail}.tar"
    lazy, plain = _range(spec), expand_braces(spec)
    assert list(lazy) == plain == [lazy[i] for i in range(len(lazy))]
    both = Joined([lazy, [], ["b.tar"], lazy])
    assert list(both) == [*plain, "b.tar", *plain] == [both[i] for i in range(len(both))]
    assert both[-1] == plain[-1]
    assert both[1:3] == list(both)[1:3]


@given(
    st.lists(st.tuples(st.sampled_from(["0.tar", "1.tar", "2.tar", 'q"']), st.integers(0, 9)), max_size=4),
    st.sampled_from([None, 1]),
    st.data(),
)
def test_counts_read_in_order_are_those_of_the_json(pairs, indent, data):
    """The quick reading gives what json gives, or declines."""
    text = json.dumps(dict(pairs), indent=indent).encode()
    names = [f"memory://d/{name}" for name in data.draw(st.permutations(list(dict(pairs))))]
    found = in_order(text, names)
    assert found is None or found == [dict(pairs)[name.rpartition("/")[2]] for name in names]
    if names and all(n.rpartition("/")[2] == k for n, k in zip(names, dict(pairs))) and 'q"' not in dict(pairs):
        assert found is not None
    assert in_order(text + b"x", names) is None
    assert in_order(text[:-1], names) is None


@pytest.mark.parametrize("spec", ["{0..99999999999}.tar", "{0..9999}/{0..9999}.tar", "{0..99999999999}{5..1}.tar"])
@pytest.mark.parametrize("where", ["", "s3://bucket/"])
def test_more_names_than_can_be_meant_are_refused(spec, where):
    with pytest.raises(ShardError, match=r"its braces stand for [0-9,]+ names, more than 10,000,000"):
        expand(where + spec)


def test_numbers_too_long_to_be_numbers_are_literal():
    spec = "{0.." + "9" * 5000 + "}.tar"
    assert expand_braces(spec) == [spec]


PIECES = st.sampled_from(
    [
        "{0..3}",
        "{08..11}",
        "{0..10}",
        "{3..1}",
        "{2..-1}",
        "{0..9..4}",
        "{a..c}",
        "{x,y}",
        "{,z}",
        "{n{1..2},m}",
        "{{0..1},q}",
        "{w}",
        "a",
        "-",
        "/",
    ]
)


@given(st.lists(PIECES, max_size=4).map("".join))
def test_braces_mean_what_they_mean_to_webdataset(spec):
    """Padding, steps, descending ranges, letters and nesting, written out and as a lazy range; counted before they are written out."""
    for text in ("s/" + spec, "s3://bucket/" + spec):
        names = expand_urls(text)
        assert expand_braces(text) == names
        assert _count_names(text) == len(names)
        assert (lazy := _range(text)) is None or list(lazy) == names


@pytest.mark.parametrize("name", ["a{b", "a}b{0..2}", r"a\{b", "a{b}", "{}", "{" * 3000 + "}" * 3000])
def test_what_is_not_a_brace_expression_is_a_name(name):
    assert expand_braces(name) == [name]


def test_nested_ranges_are_counted_as_a_whole():
    assert len(expand_braces("{{0..9999},{0..9999}}")) == 20_000
    with pytest.raises(ShardError, match="stand for 100,020,001 names"):
        expand("s3://bucket/{{0..10000}/{0..9999},{0..10000}}.tar")
    with pytest.raises(ShardError, match=r"over 10\^18 names"):
        expand("{0..9999999999}" * 500)


@pytest.mark.parametrize("name", ["set[v2]", "set[12]", "a{b,c}", "what?", "star*", "{0..3}", "a]b[", "deep[1]/er{x,y}"])
@pytest.mark.parametrize("spec", ["{}/*.tar", "{}/**/*.tar", "{}/0[01].tar", "{}/{{00..01}}.tar", "{}", "{}/00.tar::{}/01.tar"])
def test_folders_whose_names_hold_special_characters_are_themselves(name, spec, tmp_path):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    for shard in ("00.tar", "01.tar"):
        (folder / shard).write_bytes(b"x")
    assert list(expand(spec.replace("{{", "<").replace("}}", ">").replace("{}", str(folder)).replace("<", "{").replace(">", "}"))) == [
        str(folder / "00.tar"),
        str(folder / "01.tar"),
    ]


def test_brackets_choose_where_a_name_with_them_does_not_exist(tmp_path):
    for name in ("set1", "set2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").write_bytes(b"x")
    assert list(expand(f"{tmp_path}/set[12]/*.tar")) == [f"{tmp_path}/set1/0.tar", f"{tmp_path}/set2/0.tar"]
    (tmp_path / "x[v2]-0.tar").write_bytes(b"x")
    assert list(expand(f"{tmp_path}/x[v2]-*.tar")) == [f"{tmp_path}/x[v2]-0.tar"]
    assert list(expand(f"{tmp_path}/{{set1,set2}}/*.tar")) == [f"{tmp_path}/set1/0.tar", f"{tmp_path}/set2/0.tar"]
