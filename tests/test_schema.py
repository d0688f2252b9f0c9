import dataclasses
import typing

import pytest

from folding import schema


@dataclasses.dataclass
class Inner:
  size: int = 3
  rate: float = 0.5
  kind: typing.Literal["a", "b"] = "a"


@dataclasses.dataclass
class Outer:
  name: str = "x"
  limit: int | None = None
  share: float | None = None
  on: bool = False
  inner: Inner = dataclasses.field(default_factory=Inner)


def test_build_is_the_inverse_of_asdict():
  outer = Outer("y", 4, 0.25, True, Inner(7, 1.5, "b"))
  assert schema.build(Outer, dataclasses.asdict(outer), "config") == outer


def test_fields_left_out_keep_their_defaults():
  built = schema.build(Outer, {"inner": {"size": 9}}, "config")
  assert built == Outer(inner=Inner(size=9))


def test_an_int_becomes_the_float_that_a_field_wants():
  built = schema.build(Outer, {"share": 1, "inner": {"rate": 2}}, "config")
  assert (type(built.share), type(built.inner.rate)) == (float, float)
  assert (built.share, built.inner.rate) == (1.0, 2.0)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"nam": "x"}, r"config has no field 'nam'; did you mean name\?"),
    ({"zzz": 1}, r"config has no field 'zzz'; its fields are name, limit"),
    ({"inner": {"sise": 1}}, r"config\.inner has no field 'sise'"),
    ({"name": 3}, r"config\.name must be str; it is 3"),
    ({"name": None}, r"config\.name must be str; it is None"),
    ({"limit": 1.0}, r"config\.limit must be int or None; it is 1\.0"),
    ({"limit": True}, r"config\.limit must be int or None; it is True"),
    ({"on": 1}, r"config\.on must be bool; it is 1"),
    ({"share": "1"}, r"config\.share must be float or None; it is '1'"),
    ({"share": float("nan")}, r"config\.share must be .*; it is nan"),
    pytest.param({"share": 10**400}, "share must be .*; it is inf", id="huge"),
    ({"share": float("inf")}, r"config\.share must be .*; it is inf"),
    ({"inner": {"rate": True}}, r"config\.inner\.rate must be float"),
    ({"inner": {"kind": "c"}}, r"kind must be one of 'a', 'b'; it is 'c'"),
  ],
  ids=lambda x: None if isinstance(x, str) else str(x),
)
def test_a_wrong_name_or_type_is_one_line(values, message):
  with pytest.raises(schema.ConfigError, match=message) as caught:
    schema.build(Outer, values, "config")
  assert "\n" not in str(caught.value)


def test_fields_are_the_leaves_of_nested_dataclasses():
  assert schema.fields(Outer) == {
    "name": str,
    "limit": int | None,
    "share": float | None,
    "on": bool,
    "inner.size": int,
    "inner.rate": float,
    "inner.kind": typing.Literal["a", "b"],
  }


def test_differences_name_old_and_new():
  a, b = Outer(limit=2), Outer(name="z", limit=2, inner=Inner(rate=0.1))
  assert schema.differences(a, b) == [
    "name: 'x' -> 'z'",
    "inner.rate: 0.5 -> 0.1",
  ]


def test_equal_configs_do_not_differ():
  assert schema.differences(Outer(), Outer()) == []


def test_require_is_silent_where_the_condition_holds():
  assert schema.require(True, "never shown") is None


def test_require_raises_the_message():
  with pytest.raises(schema.ConfigError, match="^shown$"):
    schema.require(False, "shown")
