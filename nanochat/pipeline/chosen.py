"""The profile of a run as it will be: with the planner's depth, or the shape of the model that it goes on from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from nanochat.cards import DeviceInfo, find_card, training_speed
from nanochat.files import read_json, write_json
from nanochat.interop.start_model import StartModel
from nanochat.pipeline.profiles import BaseModel, Profile, Settings, choose_profile, fit_batches
from nanochat.plan.planning import DEPTHS, Row, card_speed, on_card, plan
from nanochat.plan.scaling_law import ERROR

# Of a profile's steps: in however little time, everything still fits together; and without HOURS a fast machine is done
# sooner, since what more would give was not tried.
SMALLEST_SHARE, MOST_SHARE = 0.05, 3.0


def planned_rows(profile: Profile, devices: Sequence[DeviceInfo]) -> list[Row]:
    """What each depth would give in the profile's hours on these cards; empty without hours or for an unknown card.

    From data sheets, not measured: a run that resumes must find the same depth.
    """
    card = find_card(min(devices, key=lambda device: training_speed(device.name)).name) if devices else None
    if card is None or profile.hours is None:
        return []
    budget, roofline = on_card(
        card,
        hours=profile.hours,
        recipe=profile.recipe,
        vocab_size=profile.vocab_size,
        sequence_len=profile.max_seq_len,
        num_cards=profile.nproc,
        fineweb=profile.dataset == "fineweb_edu",
    )
    return plan(sorted({*DEPTHS, profile.depth}), budget, card_speed(roofline, budget))


def profile_for(settings: Settings, devices: Sequence[DeviceInfo]) -> Profile:
    """`choose_profile`; a card that can't hold the profile's depth, and DEPTH=auto, get the planner's best depth.

    Raises:
        ValueError: DEPTH=auto where the planner can't say.
    """
    profile = choose_profile(settings, len(devices))
    if profile.name != "p100" or settings.depth is not None or settings.base:
        if settings.auto_depth:
            raise ValueError(f"DEPTH=auto plans for CUDA cards, not for PROFILE={profile.name}: set DEPTH to a number")
        return profile
    rows = planned_rows(profile, devices)
    best = next((row for row in rows if row.best), None)
    cards = " and ".join(dict.fromkeys(device.name for device in devices))
    if best is None:
        if settings.auto_depth:
            raise ValueError(f"DEPTH=auto: the planner has no data sheet of {cards}: set DEPTH to a number")
        return profile
    own = next(row for row in rows if row.depth == profile.depth)
    if own.bpb is not None and not settings.auto_depth:
        if best.depth == own.depth:
            about = f"depth {own.depth}, the planner's best for {profile.hours:g} hours on {cards}"
            return replace(profile, about=about)
        about = (
            f"depth {own.depth}; DEPTH=auto would take {best.depth}: {best.bpb:.3f} instead of {own.bpb:.3f} bits per "
            f"byte, planned for {profile.hours:g} hours on {cards}, ± {ERROR:.0%}"
        )
        return replace(profile, about=about)
    profile = choose_profile(replace(settings, depth=best.depth), len(devices))
    about = f"depth {best.depth}, which by the planner learns most in {profile.hours:g} hours on {cards} (or set DEPTH)"
    if own.bpb is None:
        about = f"{about}; depth {own.depth} does not fit"
    return replace(profile, about=about)


def fit_steps(profile: Profile, stages: Collection[str], step_seconds: float) -> Profile:
    """The profile with as many steps as its minutes, or HOURS, have room for where a step takes `step_seconds`.

    Without HOURS no fewer than its own: a slow machine takes longer, and learns as much. `stages` are those of the run.
    """
    assert profile.minutes is not None
    slower = step_seconds / profile.step_seconds  # than where the seconds were measured
    steps = {stage: number for stage, number in profile.steps.items() if stage in stages}
    training = slower * sum(profile.seconds[stage] for stage in steps)
    # Of the others much is Python and the start of programs, which a fast CPU does no faster.
    others = {stage: max(1.0, slower) * took for stage, took in profile.seconds.items() if stage in stages}
    others = {stage: took for stage, took in others.items() if stage not in steps}
    minutes = profile.minutes if profile.hours is None else 60 * profile.hours
    room = (60 * minutes - sum(others.values())) / training
    share = min(max(room, 1.0), MOST_SHARE) if profile.hours is None else max(room, SMALLEST_SHARE)
    seconds = others | {stage: slower * share * profile.seconds[stage] for stage in steps}
    steps = {stage: max(10, round(share * number / 10) * 10) for stage, number in steps.items()}
    return replace(profile, steps=steps, seconds=seconds)


def with_steps(profile: Profile, stages: Collection[str], path: Path, step_seconds: Callable[[], float]) -> Profile:
    """`fit_steps` once for a base dir, kept in `path`: the same command must find the same steps, to go on."""
    asked = [*sorted(stages), repr(replace(profile, world="", about=""))]
    known = read_json(path)
    if known.get("asked") != asked:
        fitted = fit_steps(profile, stages, step_seconds())
        known = {"asked": asked, "steps": dict(fitted.steps), "seconds": dict(fitted.seconds)}
        write_json(path, known)
    return replace(profile, steps=known["steps"], seconds=known["seconds"])


def go_on(profile: Profile, start: StartModel, given: str) -> Profile:
    """The profile of a run that goes on from `start`, as the user has `given` it: its shape, vocabulary and context.

    A forward pass reads about as many tokens as before. The recipe is the model's, but not classic, which has one
    batch for every horizon.
    """
    config = start.config
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in start.name).strip(".-") or "model"
    profile = replace(
        profile,
        base=BaseModel(given, name, start.fingerprint),
        depth=config.n_layer,
        aspect_ratio=64,
        switches={},
        vocab_size=config.vocab_size,
        max_seq_len=config.sequence_len,
        device_batch_size=max(1, profile.device_batch_size * profile.max_seq_len // config.sequence_len),
        recipe=profile.recipe if start.recipe == "classic" else start.recipe,
        minutes=None,  # how long a step of this model takes is not known
    )
    return fit_batches(profile)
