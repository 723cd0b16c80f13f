"""Break the project on purpose, one line at a time, and check that the tests notice.

    python tests/mutants             all of them, each in a copy of the project
    python tests/mutants loss wait   those whose name or file contains one of these words

Each file of this folder lists the mutants of one module: (name, file, tests that must fail, the line
as it stands, the line as it is broken). A mutant that survives shows a missing test; exit code 1.
"""
import argparse
import runpy
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
MUTANTS = [mutant for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))
           for mutant in runpy.run_path(str(path))["MUTANTS"]]


def survives(mutant: tuple) -> bool | None:
    """Whether the tests pass on a broken copy; None if the line is not found exactly once."""
    name, file, tests, line, broken = mutant
    text = (ROOT / file).read_text(encoding="utf-8")
    if text.count(line) != 1:
        return None
    with tempfile.TemporaryDirectory() as copy:
        ignored = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored, dirs_exist_ok=True)
        Path(copy, file).write_text(text.replace(line, broken), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", tests]
        try:
            done = subprocess.run(command, cwd=copy, capture_output=True, timeout=300)
        except subprocess.TimeoutExpired:
            return False                        # a test that hangs notices too
        if done.returncode not in (0, 1):
            raise SystemExit(f"{name}: pytest exits with {done.returncode}\n{done.stdout.decode()}")
        return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants whose name or file has one of these")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS
              if not args.words or any(word in mutant[0] + mutant[1] for word in args.words)]
    missed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, result in zip(chosen, pool.map(survives, chosen), strict=True):
            verdict = {None: "NO SUCH LINE", True: "SURVIVES", False: "noticed"}[result]
            print(f"{verdict:12} {mutant[1]:24} {mutant[0]}", flush=True)
            missed += result is not False
    print(f"{len(chosen) - missed} of {len(chosen)} mutants noticed")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
