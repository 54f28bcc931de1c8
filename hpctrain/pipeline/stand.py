"""What stands for a value while a forward is followed (`follow.py`): nobody knows its numbers, type, length.

What would hang on them is refused, as far as it can be seen, which `x is None` and `type(x)` can't.
"""

import operator
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import fx

from hpctrain.pipeline.trace import LIBRARY

HERE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
IN_PLACE = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)
"""Operators of Python that change a tensor."""


def asked_by_user() -> bool:
    """Whether the caller's caller is neither torch nor ours. Local."""
    asking = sys._getframe(2)
    while asking.f_back and asking.f_code.co_filename.startswith("<frozen"):  # abc, say
        asking = asking.f_back
    known = asking.f_code.co_filename.startswith((LIBRARY, HERE))
    return not known or asking.f_code.co_name == "is_tensor"


class Stand(fx.Proxy):
    """Stands for a value; what it is nobody knows."""

    def refuse(self, why: str) -> Any:
        """Refuse, also where the user's code catches errors."""
        vars(self.tracer).setdefault("refused", why)
        raise fx.proxy.TraceError(why)

    def __setitem__(self, at: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, at, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if asked_by_user():
            self.refuse(f"sets .{name} of a value")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> "Asked":
        found = Asked(self, name)
        if asked_by_user():
            if name == "data":
                self.refuse(
                    "takes .data of a value, whose changes nobody counts (under torch.no_grad() they are)"
                )
            self.tracer.asked.append(found)  # type: ignore[attr-defined]
        return found

    def __len__(self) -> int:
        return int(self.refuse("asks for the length of a value"))

    def __hash__(self) -> int:
        return int(self.refuse("takes a value as a key")) if asked_by_user() else id(self)

    def __str__(self) -> str:
        return str(self.refuse("makes words of a value")) if asked_by_user() else super().__repr__()

    def __repr__(self) -> str:
        return str(self.refuse("makes words of a value")) if asked_by_user() else super().__repr__()

    def __format__(self, form: str) -> str:
        return str(self.refuse("makes words of a value"))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self.refuse("asks for the type of a value") if asked_by_user() else Stand


class Asked(fx.proxy.Attribute, Stand):
    """An attribute or method of a value."""

    called = False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Write the call of a method down."""
        self.called = True
        return super().__call__(*arguments, **named)


def changing(name: str) -> Callable[[Any, Any], Any]:
    """Give what writes an operator down that changes its first value."""

    def change(self: Stand, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return change


for _name in IN_PLACE:
    setattr(Stand, f"__{_name}__", changing(_name))
