"""The profile of a run as it will be: with the planner's depth and vocabulary, or the shape it goes on from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from nanochat.cards import DeviceInfo, find_card, training_speed
from nanochat.files import read_json, write_json
from nanochat.interop.start_model import StartModel
from nanochat.pipeline.profiles import BaseModel, Profile, Settings, choose_profile, fit_batches
from nanochat.plan.planning import DEPTHS, VOCAB_SIZES, Row, best_row, card_speed, on_card, plan
from nanochat.plan.scaling_law import ERROR

# Of a profile's steps: in however little time, everything still fits together; and without HOURS a fast machine is done
# sooner, since what more would give was not tried.
SMALLEST_SHARE, MOST_SHARE = 0.05, 3.0


def planned_rows(profile: Profile, settings: Settings, devices: Sequence[DeviceInfo]) -> list[Row]:
    """What each depth and vocabulary that the user left open would give in the profile's hours on these cards.

    Empty without hours or for an unknown card. From data sheets, not measured: a run that resumes must find the same.
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
    depths = {profile.depth} if settings.depth is not None else {*DEPTHS, profile.depth}
    fixed = settings.vocab_size is not None or (settings.auto_depth and not settings.auto_vocab)
    vocab_sizes = {profile.vocab_size} if fixed else {*VOCAB_SIZES, profile.vocab_size}
    return plan(sorted(depths), budget, card_speed(roofline, budget), sorted(vocab_sizes))


def profile_for(settings: Settings, devices: Sequence[DeviceInfo]) -> Profile:
    """`choose_profile`, with the planner's best depth and vocabulary where these are "auto".

    A card that can't hold the profile's depth gets the planner's best depth without being asked.

    Raises:
        ValueError: DEPTH=auto or VOCAB_SIZE=auto where the planner can't say.
    """
    profile = choose_profile(settings, len(devices))
    auto = {"DEPTH": settings.auto_depth, "VOCAB_SIZE": settings.auto_vocab}
    asked = " ".join(f"{name}=auto" for name, is_auto in auto.items() if is_auto)
    number = f"set {' and '.join(name for name, is_auto in auto.items() if is_auto)} to a number"
    if profile.name != "p100" or settings.base or (settings.depth is not None and not asked):
        if asked:
            raise ValueError(f"{asked} plans for CUDA cards, not for PROFILE={profile.name}: {number}")
        return profile
    rows = planned_rows(profile, settings, devices)
    cards = " and ".join(dict.fromkeys(device.name for device in devices))
    if asked and not rows:
        raise ValueError(f"{asked}: the planner has no data sheet of {cards}: {number}")
    planned = f"planned for {profile.hours:g} hours on {cards}, ± {ERROR:.0%}"
    own = best_row(row for row in rows if (row.depth, row.vocab_size) == (profile.depth, profile.vocab_size))
    best = best_row(rows)
    if own is not None and best is not None and not asked:
        if best == own:
            return replace(profile, about=f"{_size(own)}, the planner's best: {own.bpb:.3f} bits per byte, {planned}")
        flags = "DEPTH=auto" if settings.vocab_size else "DEPTH=auto VOCAB_SIZE=auto"
        instead = f"{best.bpb:.3f} instead of {own.bpb:.3f} bits per byte"
        return replace(profile, about=f"{_size(own)}; {flags} would take {_size(best)}: {instead}, {planned}")
    if not settings.auto_vocab:
        rows = [row for row in rows if row.vocab_size == profile.vocab_size]
    fitting = best_row(row for row in rows if row.depth == profile.depth)
    best = best_row(rows) if settings.auto_depth or (fitting is None and settings.depth is None) else fitting
    if best is None:
        if asked:
            raise ValueError(f"{asked}: nothing that was planned fits into {cards}: set a smaller DEPTH")
        return profile
    about = f"{_size(best)}, which by the planner learn most: {best.bpb:.3f} bits per byte, {planned}"
    if fitting is None:
        about = f"{about}; depth {profile.depth} does not fit"
    return replace(
        choose_profile(replace(settings, depth=best.depth, vocab_size=best.vocab_size), len(devices)), about=about
    )


def _size(row: Row) -> str:
    """As the user reads it."""
    return f"depth {row.depth}, vocabulary {row.vocab_size:,}"


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
