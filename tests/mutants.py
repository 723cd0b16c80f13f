"""Break the project on purpose, one line at a time, and see that the tests notice.

    python tests/mutants.py             all of them, each in a copy of the project
    python tests/mutants.py loss wait   those whose name contains one of these words

A mutant is (name, file, line as it stands, line as it is broken, tests that must fail). One that
lives is a missing test, and the exit code is 1. A line that is no longer there is an error too.
"""
import argparse
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL, DATA, TRAIN, SAMPLE, FORCE, PROGRAMS, CHECKPOINTS, TEACHER, SELECT = (
    f"tests/test_{name}.py" for name in ("model", "data", "train", "sample", "budget_force",
                                         "programs", "checkpoints", "teacher", "select"))
MUTANTS = [
    # model.py
    ("a document sees its neighbour", "model.py", "q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2)",
     "[q], [k], [v]", MODEL),
    ("positions in bf16", "model.py", "angles = positions[:, None, :, None].float() * frequencies ",
     "angles = positions[:, None, :, None].bfloat16() * frequencies.bfloat16() ", CHECKPOINTS),
    ("pairs of neighbours are rotated", "model.py", "torch.cat((-x[..., half:], x[..., :half]), dim=-1)",
     "torch.cat((x[..., half:], -x[..., :half]), dim=-1)", CHECKPOINTS),
    ("llama 3 keeps its frequencies", "model.py", "frequencies * (kept + (1 - kept) / llama3[\"factor\"])",
     "frequencies * (kept + (1 - kept))", CHECKPOINTS),
    ("a norm without its weight", "model.py", "self.weight.shape, self.weight.float(), self.eps)",
     "self.weight.shape, None, self.eps)", MODEL),
    ("q is not normed", "model.py", "q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))",
     "q = self.q_proj(x).view(B, T, -1, self.head_dim)", CHECKPOINTS),
    ("the cache sees one place too many", "model.py", "torch.arange(end, device=k.device) <= places",
     "torch.arange(end, device=k.device) - 1 <= places", MODEL),
    ("the cache does not move on", "model.py", "        self.filled += T\n", "", MODEL),
    ("a moved row leaves its end behind", "model.py", "tensor[target, :, :n] = tensor[source, :, :n]",
     "tensor[target, :, :n - 1] = tensor[source, :, :n - 1]", SAMPLE),
    ("a target's probability stays", "model.py", "lacking = p.gather(1, t) - 1", "lacking = p.gather(1, t)",
     MODEL),
    ("the loss lacks its logarithm", "model.py", "loss = (top - p.amax(1).log() - wanted).sum()",
     "loss = (top - wanted).sum()", MODEL),
    ("the weight gradient of the last chunk", "model.py",
     "grad_weight[v:v + words] += torch.mm", "grad_weight[v:v + words] = torch.mm", MODEL),
    ("the weight gradient in bf16", "model.py",
     "torch.zeros_like(weight, dtype=torch.float32) if", "torch.zeros_like(weight, dtype=torch.bfloat16) if",
     MODEL),
    ("backward does not scale", "model.py", "grad_hidden = grad_hidden * grad_loss ",
     "grad_hidden = grad_hidden ", MODEL),
    ("a sliding window is taken", "model.py", 'if raw.get("use_sliding_window") or', "if False and", CHECKPOINTS),
    ("a shard anywhere on the disk", "model.py", "if not plain:", "if False:", CHECKPOINTS),
    # data.py
    ("text becomes control tokens", "data.py", "return self.plain.encode(text, add_special_tokens=False).ids",
     "return self.tokenizer.encode(text, add_special_tokens=False).ids", DATA),
    ("the loss mask one too early", "data.py", "return [-100] * (first - 1) + ids[first:] + [-100]",
     "return [-100] * (first - 2) + ids[first - 1:] + [-100]", DATA),
    ("positions do not start again", "data.py", "torch.cat([torch.arange(n) for n in lengths])[None]",
     "torch.arange(sum(lengths))[None]", DATA),
    ("an epoch's order is another's", "data.py", 'random.Random(f"epoch {seed} {epoch}")',
     'random.Random(f"epoch {seed}")', DATA),
    ("the first box counts", "data.py", 'start = text.rfind("\\\\boxed{")', 'start = text.find("\\\\boxed{")', DATA),
    ("braces are not matched", "data.py", 'depth += {"{": 1, "}": -1}.get(text[i], 0)',
     'depth += {"}": -1}.get(text[i], 0) if depth else 1', DATA),
    ("a number may be used twice", "data.py", 'sorted(used) == sorted(answer["numbers"])',
     'set(used) == set(answer["numbers"])', DATA),
    ("a tuple has no order", "data.py", 'if a[0] != "set":', 'if a[0] == "matrix":', DATA),
    ("a decimal is near enough", "data.py", "rel_tol=1e-9, abs_tol=1e-12", "rel_tol=1e-2, abs_tol=1e-12", DATA),
    ("held-out questions are trained on", "data.py", '"train" if bucket < 15', '"train" if bucket < 18', DATA),
    ("the assistant's turn has no end", "data.py", "{self.closing}{{answer}}{self.family.tail}",
     "{self.closing}{{answer}}", DATA),
    ("steps are not counted down", "data.py", "left = iter(range(len(steps) - 1, -1, -1))",
     "left = iter(range(len(steps)))", DATA),
    ("a torn line is a row", "data.py", "                file.truncate(end)\n                break\n",
     "                break\n", TEACHER),
    ("another's file is cut", "data.py", "if not whole and line.startswith(ours[:len(line)]):", "if not whole:", TEACHER),
    ("a redirect is a reply", "data.py", "again = status in (200, 408, 409, 429) or status >= 500",
     "again = status in (200, 408, 409, 429) or status >= 300", TEACHER),
    ("a refusal is tried again", "data.py", "again = status in (200, 408, 409, 429) or status >= 500",
     "again = True", TEACHER),
    ("busy is a refusal", "data.py", "again = status in (200, 408, 409, 429) or", "again = status in (200, 409, 429) or",
     TEACHER),
    ("Retry-After is not heard", "data.py", "if failure.after is not None:", "if False:", TEACHER),
    ("milliseconds are seconds", "data.py", 'float(headers["retry-after-ms"]) / 1000', 'float(headers["retry-after-ms"])',
     TEACHER),
    ("a 429 slows one worker", "data.py", "self.pause = max(self.pause, due)", "pass", TEACHER),
    ("a dripping server", "data.py", "    guard.start()\n", "", TEACHER),
    ("the key in an echo", "data.py", "return text.replace(secret, \"[key]\") if", "return text if", TEACHER),
    ("dollars without a limit", "data.py", "self.broke = worst > self.limit", "self.broke = False", TEACHER),
    ("what is answered is asked again", "data.py", "if job.key not in done)", ")", TEACHER),
    ("a cut reply is trained on", "data.py", 'if row.get("unfit"): ', "if False: ", TEACHER),
    ("thinking stays in the answer", "data.py", "inside, content = [content[:closed.start()]], content[closed.end():]",
     "inside = [content[:closed.start()]]", TEACHER),
    ("http to anywhere", "data.py", 'if url.scheme == "http" and not loopback and not plain:', "if False:", TEACHER),
    ("seven words are contamination", "data.py", "for i in range(len(said) - words + 1)}",
     "for i in range(len(said) - words + 2)}", SELECT),
    ("accepted questions do not join", "data.py", "        seen_runs.update(runs)\n", "", SELECT),
    ("accepted questions count as benchmarks", "data.py", "    seen_whole, seen_runs = set(), set()\n",
     "    seen_whole, seen_runs = set(), held_runs\n", SELECT),
    ("short questions never match", "data.py", "whole in held_whole or not", "not", SELECT),
    ("errors are answers", "data.py", "if ERRORS.search(thinking[:1000]) or ERRORS.search(answer[:1000]):", "if False:", SELECT),
    ("verdicts are not joined", "data.py", "verdicts.get(trace[0]) or any", "any", SELECT),
    ("the shortest first", "data.py", "key=lambda pair: (-len(pair[1][1]), pair[1][0])",
     "key=lambda pair: (len(pair[1][1]), pair[1][0])", SELECT),
    ("a third with each rank", "data.py", "[2.0 ** -rank if by_length", "[3.0 ** -rank if by_length", SELECT),
    ("large domains come more often", "data.py", "name = rng.choice(list(groups))",
     "name = rng.choice([name for name in groups for _ in groups[name]])", SELECT),
    ("a wrong trace is a seed", "data.py", "len(trace[1]) >= seed_length and right(row, trace, teacher)][:n]",
     "len(trace[1]) >= seed_length][:n]", SELECT),
    ("a pool of held-out questions", "data.py", 'countdown_keys("train", 2 * HIGHEST)', 'countdown_keys("test", 2 * HIGHEST)',
     SELECT),
    # train.py
    ("a mean of means", "train.py", "(loss / supervised * world).backward()",
     "(loss / max(1, (targets != -100).sum()) * world / len(rows)).backward()", TRAIN),
    ("processes are not averaged back", "train.py", "(loss / supervised * world).backward()",
     "(loss / supervised).backward()", TRAIN),
    ("no clipping", "train.py", "clip_grad_norm_(model.parameters(), args.clip)",
     "clip_grad_norm_(model.parameters(), 1e9)", PROGRAMS),
    ("no warm-up", "train.py", "return highest * (step + 1) / rising", "return highest", PROGRAMS),
    ("vectors decay", "train.py", '{"params": vectors, "weight_decay": 0.0}',
     '{"params": vectors, "weight_decay": args.weight_decay}', PROGRAMS),
    ("the first beta", "train.py", "betas=(0.9, 0.95)", "betas=(0.8, 0.95)", PROGRAMS),
    ("a resume without the optimizer", "train.py", "put(state[key], file.get_slice(f\"{key}.{name}\"))", "pass",
     TRAIN),
    ("a resume reads the data again from its start", "train.py", "zip(bar, itertools.islice(batches, done, None))",
     "zip(bar, batches)", TRAIN),
    ("another run is resumed", "train.py", "refuse_other(state[\"run\"], run)", "pass", TRAIN),
    ("over-long examples stay", "train.py", "if len(example[0]) <= longest]", "]", PROGRAMS),
    ("a checkpoint in place", "train.py", 'final.with_name(final.name + ".draft") if', "final if", TRAIN),
    # sample.py
    ("a free slot waits", "sample.py", "min(len(waiting), self.slots - len(rows))",
     "0 if rows else min(len(waiting), self.slots)", SAMPLE),
    ("forced tokens count as sampled", "sample.py", "            row.forced.append(True)\n",
     "            row.forced.append(False)\n", SAMPLE),
    ("a forced token costs a draw", "sample.py", "row.draws.random() if not row.queue else 0.0",
     "row.draws.random()", SAMPLE),
    ("all samples draw alike", "sample.py", 'random.Random(f"{seed} {prompt} {sample}")',
     'random.Random(f"{seed} {prompt}")', SAMPLE),
    ("banned tokens are drawn", "sample.py", "            if row.banned:", "            if False:", SAMPLE),
    ("nucleus without its last", "sample.py", "ranked.cumsum(-1) - ranked >= top_p", "ranked.cumsum(-1) >= top_p",
     SAMPLE),
    ("every sample reads the prompt", "sample.py", "readers, logits = [row for row in new if row.sample == 0], []",
     "readers, logits = [*new], []", SAMPLE),
    ("the logits of a shorter prompt's filling", "sample.py", "[len(row.prompt) - 1 for row in rows]",
     "[width - 1 for row in rows]", SAMPLE),
    # budget_force.py
    ("the budget off by one", "budget_force.py", "        if left <= 0:", "        if left <= -1:", FORCE),
    ("each extension has a budget anew", "budget_force.py",
     "self.max_thinking - (len(row.tokens) - row.memory.start)",
     "self.max_thinking * (row.memory.waits + 1) - (len(row.tokens) - row.memory.start)", FORCE),
    ("one Wait too many", "budget_force.py", "thought.waits < self.waits and", "thought.waits <= self.waits and", FORCE),
    ("a stop right behind a Wait", "budget_force.py", "row.banned = {end[0] for end in self.ends}", "row.banned = set()",
     FORCE),
    ("no Final Answer on a cut", "budget_force.py", "newline + self.close, self.final)", "newline + self.close, [])",
     FORCE),
    ("Final Answer on a natural stop", "budget_force.py", '"natural", self.close, [])',
     '"natural", self.close, self.final)', FORCE),
    ("the delimiter twice", "budget_force.py", "        elif len(row.tokens) - thought.begin < self.max_answer:",
     "        if len(row.tokens) - thought.begin < self.max_answer:", FORCE),
    ("the answer has no budget", "budget_force.py", "len(row.tokens) - thought.begin < self.max_answer", "True", FORCE),
    ("a delimiter's head stays", "budget_force.py", "            row.withdraw(len(end) - 1)\n            wait =",
     "            wait =", FORCE),
    ("the opening is paid for", "budget_force.py", "Thought(start=0 if opened else len(self.open))", "Thought()", FORCE),
    ("grace without end", "budget_force.py", "int(self.grace * self.max_thinking)", "int(9 * self.max_thinking)", FORCE),
    ("tries have no verdict", "budget_force.py", '"found": None, "correct": False}', "}", FORCE),
    ("the rarest answer wins", "budget_force.py", "votes.most_common(1)[0][0]", "votes.most_common()[-1][0]", FORCE),
    ("coverage is the first sample", "budget_force.py", '(row for row in rows if row["correct"])',
     "(row for row in rows)", FORCE),
    ("votes think for one", "budget_force.py",
     'row = next(row for row in rows if row["found"] == winner)\n    return {**row, "thinking_tokens": sum(',
     'row = next(row for row in rows if row["found"] == winner)\n    return {**row, "thinking_tokens": max(', FORCE),
    ("a torn line of the journal", "budget_force.py", 'file.truncate(whole.rfind(b"\\n") + 1)', "pass", PROGRAMS),
    ("another evaluation goes on", "budget_force.py", 'if said.is_file() and said.read_text(encoding="utf-8") != text:',
     "if False:", PROGRAMS),
    ("what is done is asked again", "budget_force.py", "if i not in rows and i % world == rank", "if i % world == rank",
     PROGRAMS),
    ("each process asks all", "budget_force.py", "if i not in rows and i % world == rank", "if i not in rows", PROGRAMS),
    ("the others' rows are lost", "budget_force.py", "        rows = rows | share(fresh)", "        rows = rows | fresh", PROGRAMS),
    ("asking is forced too", "budget_force.py", '"tokens": Method("tokens", False)', '"tokens": Method("tokens")', PROGRAMS),
    ("control counts nothing", "budget_force.py", "return tokens <= self.max_thinking", "return True", FORCE),
    ("the axis is not doublings", "budget_force.py", "axis=math.log2, least", "axis=math.log, least", FORCE),
    ("pairs that are one point", "budget_force.py", "if math.log2(b / a) > least]", "if b > a]", FORCE),
    ("a one-sided sign test", "budget_force.py", "min(1.0, 2 * tail / 2 ** either)", "min(1.0, tail / 2 ** either)", FORCE),
    ("the text behind thinking", "budget_force.py",
     "chat.decode(row.tokens[thought.answer:len(row.tokens)", "chat.decode(row.tokens[:len(row.tokens)", PROGRAMS),
]


def lives(mutant):
    """Do the tests pass on a broken copy? None where the line is not there once."""
    name, file, line, broken, tests = mutant
    text = (ROOT / file).read_text(encoding="utf-8")
    if text.count(line) != 1:
        return None
    with tempfile.TemporaryDirectory() as copy:
        for part in ("assets", "tests", *(path.name for path in ROOT.glob("*.py"))):
            (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, Path(copy, part))
        Path(copy, file).write_text(text.replace(line, broken), encoding="utf-8")
        try:
            done = subprocess.run([sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", tests],
                                  cwd=copy, capture_output=True, timeout=300)
        except subprocess.TimeoutExpired:
            return False                        # a test that hangs has noticed too
        if done.returncode not in (0, 1):
            raise SystemExit(f"{name}: pytest ended with {done.returncode}\n{done.stdout.decode()}")
        return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants whose name or file has one of these")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.words or any(w in m[0] + m[1] for w in args.words)]
    left = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, alive in zip(chosen, pool.map(lives, chosen)):
            said = {None: "NO SUCH LINE", True: "LIVES", False: "noticed"}[alive]
            print(f"{said:12} {mutant[1]:16} {mutant[0]}", flush=True)
            left += [mutant[0]] * (alive is not False)
    print(f"{len(chosen) - len(left)} of {len(chosen)} mutants noticed")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
