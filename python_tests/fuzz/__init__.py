"""Random damaged and odd input for every reader, command and operator; nothing surprising must come out.

    python -m python_tests.fuzz [--seconds N | --count N] [--seed S] [--only KIND ...]

prints how many cases of each kind were tried and what came out, and ends with status 1 if any was *other*.
A case that was *other* is shown with the command that repeats it.

A kind is one function in any module of `python_tests/fuzz/kinds/` (every file there is loaded):

    from fuzz import Outcome, kind, mutate

    @kind("nifti", seconds=10, megabytes=500)
    def damaged_nifti(rng: random.Random, folder: Path) -> Outcome:
        path = folder / "scan.nii.gz"
        path.write_bytes(mutate.damaged(rng, sample()))
        volume = read_volume(path)                    # an InputError may pass through: the outcome is "clear"
        assert np.array_equal(volume.data, expected)  # what is read in spite of the damage must be right
        return Outcome.SAME

- The function draws everything from `rng`, which is keyed by (seed, kind, number of the case), so that a case
  can be repeated alone. `folder` is new and empty, and is removed afterwards. What is costly is made once per
  process, in a function under `functools.cache`, with its files in `scratch()`.
- It returns `Outcome.RIGHT` (the input was good, and the result is what it must be) or `Outcome.SAME` (the
  damage changed nothing that counts), or lets an exception pass. `InputError` with a message in our form (one
  line, then a few indented ones; no control characters; no other program's report) is `CLEAR`.
- Anything else is `OTHER`: any other exception, a failed `assert`, a crash of the process, a case that takes
  more than `seconds` of processor time or hangs, or more than `megabytes` of memory beyond what was resident.
- Kinds run in turn in one worker process, which gets a new one after a crash or a hang. Imports at the top of
  the module of a kind cost no case its time.
"""

from . import mutate
from .registry import Kind, Outcome, kind, scratch

__all__ = ["Kind", "Outcome", "kind", "mutate", "scratch"]
