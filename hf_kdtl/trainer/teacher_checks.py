"""Whether there is a teacher for each objective, and an objective for each teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_kdtl.config import DistillationConfig
from hf_kdtl.models.teachers import check_names
from hf_kdtl.utils.options import suggestion


def check_teacher_usage(teacher: Any, config: DistillationConfig) -> None:
    """Raises ValueError when a teacher or a start is given and unused, or a teacher is missing."""
    objectives = config.build_objectives()
    if config.start is not None and all(objective.source != "start" for objective in objectives.values()):
        raise ValueError(
            f"start is {config.start!r} and no objective holds the student to it. Add one, such as "
            '{"name": "l2_sp", "weight": 0.01}, or leave start out (the student is chosen by model=...).'
        )
    users = check_teacher_given(teacher, config)
    if teacher is not None and not users:
        raise ValueError(
            'a teacher was given and no objective uses it. Add one, such as {"name": "logit_kd", "weight": 0.9}, or '
            "leave the teacher out."
        )
    names = _teacher_names(teacher)
    if names != ["teacher"] and (unused := [name for name in names if name not in users.values()]):
        raise ValueError(
            f'the teacher {unused[0]!r} is not used. Add an objective, such as {{"name": "logit_kd", "teacher": '
            f'"{unused[0]}"}}, or leave that teacher out.'
        )


def check_teacher_given(teacher: Any, config: DistillationConfig) -> dict[str, str]:
    """Raises ValueError when a teacher is missing, or one of several is not named.

    Returns:
        {an objective or layer_rates: the name of its teacher}.
    """
    needing = {key: one.source for key, one in config.build_objectives().items() if one.needs_teacher}
    options = config.rate_options
    measured = options is not None and options.measured
    if teacher is None and needing:
        raise ValueError(
            f"the objectives {', '.join(needing)} need a teacher and none was given. Pass teacher=<a model, Teacher, "
            'or path>, or train without one: objectives=[{"name": "task"}].'
        )
    if teacher is None and options is not None and measured:
        raise ValueError(
            f"layer_rates: mode {options.mode!r} compares the student with a teacher and none was given. Pass "
            "teacher=<a model, Teacher, or path>, or take mode 'llrd'."
        )
    users = {f"objective {key!r}": name for key, name in needing.items()}
    users |= {"layer_rates": options.teacher_name} if options is not None and measured else {}
    if teacher is not None and users:
        _check_teacher_names(teacher, users)
    return users


def _check_teacher_names(teacher: Any, users: dict[str, str]) -> None:
    """Raises ValueError unless every user names one of the teachers."""
    if isinstance(teacher, Mapping):
        check_names(teacher)
    names = _teacher_names(teacher)
    for user, name in users.items():
        if name in names:
            continue
        if names == ["teacher"]:
            raise ValueError(
                f"{user}: it takes its signals from teacher {name!r}, and there is one teacher, without a name. Leave "
                f"its 'teacher' out, or pass several: teacher={{\"{name}\": <path>, ...}}."
            )
        found = "does not say which teacher" if name == "teacher" else f"takes its signals from {name!r}"
        raise ValueError(f"{user}: it {found}; set its 'teacher' to one of {names}.{suggestion(name, names)}")


def _teacher_names(teacher: Any) -> list[str]:
    members = teacher if isinstance(teacher, Mapping) else getattr(teacher, "members", dict)()
    return list(members) or ["teacher"]
