"""What a schedule must be: the set of its due steps over 0..N, on the host and traced, asked in every way."""

import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.schedules import at, every

N = 60


# The oracle: sets of steps, written from the documentation and sharing nothing with the code.


def due_every(n, start=0, stop=None, max_fires=None, upto=N):
    due = [s for s in range(upto + 1) if (s > 0 and s % n == 0 if start == 0 else s >= start and (s - start) % n == 0)]
    due = [s for s in due if stop is None or s <= stop]
    return set(due if max_fires is None else due[:max_fires])


# The law. It returns what is wrong, so that wrong schedules can prove that it finds them.


def host_violation(schedule, due):
    for step in range(-1, N):
        expected = min((s for s in due if s > step), default=None)
        for _ in range(2):  # asked twice, it answers the same
            found = schedule.next_step(step)
            if found != expected and not (expected is None and found is not None and found > N):
                return f"next_step({step}) is {found}, not {expected}"
    for step in range(N + 1):
        if schedule.is_due(step) is not (step in due):
            return f"is_due({step}) is {schedule.is_due(step)}"
    for after, upto in ((-1, N), (0, N), (5, 5), (10, 30), (30, 10), (9, 10)):
        if list(schedule.due_steps(after, upto)) != sorted(s for s in due if after < s <= upto):
            return f"due_steps({after}, {upto}) is {list(schedule.due_steps(after, upto))}"
    return None


def traced_violation(schedule, due, is_due=None):
    steps = jnp.arange(N + 1)
    found = (is_due or schedule.is_due)(steps)
    if found.dtype != bool or found.shape != steps.shape:
        return f"is_due is {found.dtype}{found.shape}"
    found = set(np.flatnonzero(np.asarray(found)).tolist())
    return None if found == {s for s in due if s <= N} else f"is_due differs at {sorted(found ^ due)}"


def repr_violation(schedule):
    pasted = eval(repr(schedule), {"at": at, "every": every})
    return None if pasted == schedule and hash(pasted) == hash(schedule) and repr(pasted) == repr(schedule) else pasted
