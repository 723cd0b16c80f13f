"""Break the project on purpose, one line at a time, and see that the tests notice.

    python tests/mutants.py             all of them, each in a copy of the project
    python tests/mutants.py loss wait   those whose name contains one of these words

A mutant is (name, file, tests that must fail, line as it stands, line as it is broken). One that
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
    ('a document sees its neighbour', 'model.py', MODEL,
     'q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2)', '[q], [k], [v]'),
    ('positions in bf16', 'model.py', CHECKPOINTS,
     'angles = positions[:, None, :, None].float() * frequencies ',
     'angles = positions[:, None, :, None].bfloat16() * frequencies.bfloat16() '),
    ('pairs of neighbours are rotated', 'model.py', CHECKPOINTS,
     'torch.cat((-x[..., half:], x[..., :half]), dim=-1)',
     'torch.cat((x[..., half:], -x[..., :half]), dim=-1)'),
    ('llama 3 keeps its frequencies', 'model.py', CHECKPOINTS,
     'frequencies * (kept + (1 - kept) / llama3["factor"])', 'frequencies * (kept + (1 - kept))'),
    ('a norm without its weight', 'model.py', MODEL,
     'self.weight.shape, self.weight.float(), self.eps)', 'self.weight.shape, None, self.eps)'),
    ('q is not normed', 'model.py', CHECKPOINTS,
     'rotate(self.q_norm(q), *rope)', 'rotate(q, *rope)'),
    ('the cache sees one place too many', 'model.py', MODEL,
     'torch.arange(end, device=k.device) <= places',
     'torch.arange(end, device=k.device) - 1 <= places'),
    ('the cache does not move on', 'model.py', MODEL,
     '        self.filled += T\n', ''),
    ('a moved row leaves its end behind', 'model.py', SAMPLE,
     'tensor[target, :, :n] = tensor[source, :, :n]',
     'tensor[target, :, :n - 1] = tensor[source, :, :n - 1]'),
    ("a target's probability stays", 'model.py', MODEL,
     'lacking = p.gather(1, t) - 1', 'lacking = p.gather(1, t)'),
    ('the loss lacks its logarithm', 'model.py', MODEL,
     'loss = (top - p.amax(1).log() - wanted).sum()', 'loss = (top - wanted).sum()'),
    ('the weight gradient of the last chunk', 'model.py', MODEL,
     'grad_weight[v:v + words] += torch.mm', 'grad_weight[v:v + words] = torch.mm'),
    ('the weight gradient in bf16', 'model.py', MODEL,
     'torch.zeros_like(weight, dtype=torch.float32) if',
     'torch.zeros_like(weight, dtype=torch.bfloat16) if'),
    ('backward does not scale', 'model.py', MODEL,
     'grad_hidden = grad_hidden * grad_loss ', 'grad_hidden = grad_hidden '),
    ('a sliding window is taken', 'model.py', CHECKPOINTS,
     'if raw.get("use_sliding_window") or', 'if False and'),
    ('a shard anywhere on the disk', 'model.py', CHECKPOINTS,
     'if not plain or', 'if'),
    ('recomputation recomputes nothing', 'model.py', TRAIN,
     'x = checkpoint(block, x, rope, lengths, use_reentrant=False)', 'x = block(x, rope, lengths)'),
    ('recomputation changes the gradient', 'model.py', TRAIN,
     'x = checkpoint(block, x, rope,', 'x = checkpoint(block, x.detach(), rope,'),
    # data.py
    ('text becomes control tokens', 'data.py', DATA,
     'return self.plain.encode(text, add_special_tokens=False).ids',
     'return self.tokenizer.encode(text, add_special_tokens=False).ids'),
    ('the loss mask one too early', 'data.py', DATA,
     'return [-100] * (first - 1) + ids[first:] + [-100]',
     'return [-100] * (first - 2) + ids[first - 1:] + [-100]'),
    ('positions do not start again', 'data.py', DATA,
     'torch.cat([torch.arange(n) for n in lengths])[None]', 'torch.arange(sum(lengths))[None]'),
    ("an epoch's order is another's", 'data.py', DATA,
     'random.Random(f"epoch {seed} {epoch}")', 'random.Random(f"epoch {seed}")'),
    ('the first box counts', 'data.py', DATA,
     'start = text.rfind("\\\\boxed{")', 'start = text.find("\\\\boxed{")'),
    ('braces are not matched', 'data.py', DATA,
     'depth += {"{": 1, "}": -1}.get(text[i], 0)',
     'depth += {"}": -1}.get(text[i], 0) if depth else 1'),
    ('a number may be used twice', 'data.py', DATA,
     'sorted(used) == numbers', 'set(used) == set(numbers)'),
    ('a tuple has no order', 'data.py', DATA,
     'if a.kind not in (r"\\{\\}", r"\\cup", r"\\cap"):', 'if a.kind == "&":'),
    ('an interval has no ends', 'data.py', DATA,
     'return Several(opened + closed, value.items)', 'return Several("()", value.items)'),
    ('a minus before a power', 'data.py', DATA,
     'self.climb(max(least, LEVELS["*"]))', 'self.climb(math.inf)'),
    ('plus or minus is plus', 'data.py', DATA,
     'for sign in "+-" if r"\\pm" in tokens else "+":', 'for sign in "+":'),
    ('a decimal is near enough', 'data.py', DATA,
     'rel_tol=1e-9, abs_tol=1e-12', 'rel_tol=1e-2, abs_tol=1e-12'),
    ('held-out questions are trained on', 'data.py', DATA,
     '"train" if bucket < 15', '"train" if bucket < 18'),
    ("the assistant's turn has no end", 'data.py', DATA,
     '{self.closing}{{answer}}{self.family.tail}', '{self.closing}{{answer}}'),
    ('steps are not counted down', 'data.py', DATA,
     'left = iter(range(len(steps) - 1, -1, -1))', 'left = iter(range(len(steps)))'),
    ('a torn line is a row', 'data.py', TEACHER,
     '                file.truncate(end)\n', '                pass\n'),
    ("another's file is cut", 'data.py', TEACHER,
     'if whole or not isinstance(error, ValueError) or not line.startswith(ours):', 'if False:'),
    ('a redirect is a reply', 'data.py', TEACHER,
     'again = status in (200, 408, 409, 429) or status >= 500',
     'again = status in (200, 408, 409, 429) or status >= 300'),
    ('a refusal is tried again', 'data.py', TEACHER,
     'again = status in (200, 408, 409, 429) or status >= 500', 'again = True'),
    ('busy is a refusal', 'data.py', TEACHER,
     'again = status in (200, 408, 409, 429) or', 'again = status in (200, 409, 429) or'),
    ('Retry-After is not heard', 'data.py', TEACHER,
     ' if failure.after is None else failure.after\n', '\n'),
    ('milliseconds are seconds', 'data.py', TEACHER,
     'float(headers["retry-after-ms"]) / 1000', 'float(headers["retry-after-ms"])'),
    ('a 429 slows one worker', 'data.py', TEACHER,
     'self.pause = max(self.pause, due)', 'pass'),
    ('a dripping server', 'data.py', TEACHER,
     '    guard.start()\n', ''),
    ('what waits to be written is lost', 'data.py', TEACHER,
     '                    self.change.wait_for(lambda: not self.flying, GRACE)\n', ''),
    ('the deadline is of each try', 'data.py', TEACHER,
     'deadline = min(deadline, start + self.args.deadline)',
     'deadline = start + self.args.deadline'),
    ('dollars under way are forgotten', 'data.py', TEACHER,
     'self.spent + sum(self.flying) + job.most <=', 'self.spent + job.most <='),
    ('the key in an echo', 'data.py', TEACHER,
     'return text.replace(secret, "[key]") if', 'return text if'),
    ('dollars without a limit', 'data.py', TEACHER,
     'self.spent + sum(self.flying) + job.most <= self.args.max_usd', 'True'),
    ('what is answered is asked again', 'data.py', TEACHER,
     'for job in jobs.values() if job.key not in done]', 'for job in jobs.values()]'),
    ('a cut reply is trained on', 'data.py', TEACHER,
     'if row.get("unfit"): ', 'if False: '),
    ('thinking stays in the answer', 'data.py', TEACHER,
     'inside, content = [content[:closed.start()]], content[closed.end():]',
     'inside = [content[:closed.start()]]'),
    ('http to anywhere', 'data.py', TEACHER,
     'if url.scheme == "http" and not loopback and not plain:', 'if False:'),
    ('seven words are contamination', 'data.py', SELECT,
     'hash(tuple(said[i:i + words]))', 'hash(tuple(said[i:i + words - 1]))'),
    ('accepted questions do not join', 'data.py', SELECT,
     '        seen_runs.update(runs)\n', ''),
    ('accepted questions count as benchmarks', 'data.py', SELECT,
     '    seen_whole, seen_runs = set(), set()\n',
     '    seen_whole, seen_runs = set(), held_runs\n'),
    ('short questions never match', 'data.py', SELECT,
     'whole in held_whole or not', 'not'),
    ('errors are answers', 'data.py', SELECT,
     'if ERRORS.search(thinking[:1000]) or ERRORS.search(answer[:1000]):', 'if False:'),
    ('verdicts are not joined', 'data.py', SELECT,
     'verdicts.get(trace[0]) or any', 'any'),
    ('the shortest first', 'data.py', SELECT,
     'key=lambda pair: (-len(pair[1][1]), pair[1][0])',
     'key=lambda pair: (len(pair[1][1]), pair[1][0])'),
    ('a third with each rank', 'data.py', SELECT,
     '[2.0 ** -rank if by_length', '[3.0 ** -rank if by_length'),
    ('large domains come more often', 'data.py', SELECT,
     'name = rng.choice(list(groups))',
     'name = rng.choice([name for name in groups for _ in groups[name]])'),
    ('a wrong trace is a seed', 'data.py', SELECT,
     'len(trace[1]) >= seed_length and right(row, trace, teacher)][:n]',
     'len(trace[1]) >= seed_length][:n]'),
    ('a pool of held-out questions', 'data.py', SELECT,
     'countdown_keys("train", 2 * HIGHEST)', 'countdown_keys("test", 2 * HIGHEST)'),
    ("llama's text has no beginning", 'data.py', CHECKPOINTS,
     '"<|begin_of_text|><|start_header_id|>user', '"<|start_header_id|>user'),
    ('the right option comes first', 'data.py', DATA,
     'random.Random(f"options {seed} {question}").shuffle(options)', 'pass'),
    ('processes wait for the longest row', 'data.py', TRAIN,
     '    if processes > 1:\n', '    if False:\n'),
    ('two numbers side by side are a product', 'data.py', DATA,
     'if NUMBER.match(self.tokens[-1]) and NUMBER.match(self.last):', 'if False:'),
    ('a tokenizer larger than its model', 'data.py', PROGRAMS,
     'if (size := self.tokenizer.get_vocab_size()) > vocab_size:', 'if False:'),
    # train.py
    ('a mean of means', 'train.py', TRAIN,
     '(loss / supervised * world).backward()',
     '(loss / max(1, (targets != -100).sum()) * world / len(rows)).backward()'),
    ('processes are not averaged back', 'train.py', TRAIN,
     '(loss / supervised * world).backward()', '(loss / supervised).backward()'),
    ('no clipping', 'train.py', PROGRAMS,
     'clip_grad_norm_(model.parameters(), args.clip)', 'clip_grad_norm_(model.parameters(), 1e9)'),
    ('no warm-up', 'train.py', PROGRAMS,
     'return highest * (step + 1) / rising', 'return highest'),
    ('vectors decay', 'train.py', PROGRAMS,
     '{"params": vectors, "weight_decay": 0.0}',
     '{"params": vectors, "weight_decay": args.weight_decay}'),
    ('the first beta', 'train.py', PROGRAMS,
     'betas=(0.9, 0.95)', 'betas=(0.8, 0.95)'),
    ('a resume without the optimizer', 'train.py', TRAIN,
     'put(state[key], file.get_slice(f"{key}.{name}"))', 'pass'),
    ('a resume reads the data again from its start', 'train.py', TRAIN,
     'batch, began = batches[step],', 'batch, began = batches[step - done],'),
    ('another run is resumed', 'train.py', TRAIN,
     'refuse_other(state["run"], run)', 'pass'),
    ('over-long examples stay', 'train.py', PROGRAMS,
     'if len(example[0]) <= longest]', ']'),
    ('a checkpoint in place', 'train.py', TRAIN,
     'final.with_name(final.name + ".draft") if', 'final if'),
    ('the recorded command lacks a flag', 'train.py', PROGRAMS,
     '*sys.argv[1:]])', '*sys.argv[1:-2]])'),
    ('--recompute is not heard', 'train.py', TRAIN,
     '        model.recompute = args.recompute\n', ''),
    ('--save-dtype is not heard', 'train.py', TRAIN,
     'save(out, model, getattr(torch, args.save_dtype)', 'save(out, model, None'),
    ('attention without causality', 'train.py', TRAIN,
     '+ 6 * L * H * D * sum(', '+ 12 * L * H * D * sum('),
    ('the plan always fits', 'train.py', TRAIN,
     "{'fits' if need <= room else 'does not fit'}", 'fits'),
    ('Ctrl-C stops one process', 'train.py', TRAIN,
     'stopping = anyone(bool(stop), world, device)', 'stopping = bool(stop)'),
    # sample.py
    ('a free slot waits', 'sample.py', SAMPLE,
     'min(len(waiting), self.slots - len(rows))', '0 if rows else min(len(waiting), self.slots)'),
    ('forced tokens count as sampled', 'sample.py', SAMPLE,
     '            row.forced.append(True)\n', '            row.forced.append(False)\n'),
    ('a forced token costs a draw', 'sample.py', SAMPLE,
     'row.draws.random() if not row.queue else 0.0', 'row.draws.random()'),
    ('all samples draw alike', 'sample.py', SAMPLE,
     'random.Random(f"{seed} {prompt} {sample}")', 'random.Random(f"{seed} {prompt}")'),
    ('banned tokens are drawn', 'sample.py', SAMPLE,
     '            if row.banned:', '            if False:'),
    ('nucleus without its last', 'sample.py', SAMPLE,
     'ranked.cumsum(-1) - ranked >= top_p', 'ranked.cumsum(-1) >= top_p'),
    ('every sample reads the prompt', 'sample.py', SAMPLE,
     'readers, logits = [row for row in new if row.sample == 0], []',
     'readers, logits = [*new], []'),
    ("the logits of a shorter prompt's filling", 'sample.py', SAMPLE,
     '[len(row.prompt) - 1 for row in rows]', '[width - 1 for row in rows]'),
    ('a row goes round for ever', 'sample.py', SAMPLE,
     'return "repetition" if repeats and row.repeats(repeats) else None', 'return None'),
    ('a round too many', 'sample.py', SAMPLE,
     'self.seen[run] >= times > 0', 'self.seen[run] > times > 0'),
    # budget_force.py
    ('the budget off by one', 'budget_force.py', FORCE,
     '        if left <= 0:', '        if left <= -1:'),
    ('each extension has a budget anew', 'budget_force.py', FORCE,
     'self.max_thinking - (len(row.tokens) - row.memory.start)',
     'self.max_thinking * (row.memory.waits + 1) - (len(row.tokens) - row.memory.start)'),
    ('one Wait too many', 'budget_force.py', FORCE,
     'thought.waits < self.waits and', 'thought.waits <= self.waits and'),
    ('a stop right behind a Wait', 'budget_force.py', FORCE,
     'row.banned = {end[0] for end in self.ends}', 'row.banned = set()'),
    ('no Final Answer on a cut', 'budget_force.py', FORCE,
     'newline + self.close, self.final)', 'newline + self.close, [])'),
    ('Final Answer on a natural stop', 'budget_force.py', FORCE,
     '"natural", self.close, [])', '"natural", self.close, self.final)'),
    ('the delimiter twice', 'budget_force.py', FORCE,
     '        elif len(row.tokens) - thought.begin < self.max_answer:',
     '        if len(row.tokens) - thought.begin < self.max_answer:'),
    ('the answer has no budget', 'budget_force.py', FORCE,
     'len(row.tokens) - thought.begin < self.max_answer', 'True'),
    ("a delimiter's head stays", 'budget_force.py', FORCE,
     '            row.withdraw(len(end) - 1)\n            wait =', '            wait ='),
    ('the opening is paid for', 'budget_force.py', FORCE,
     'Thought(start=0 if opened else len(self.open))', 'Thought()'),
    ('grace without end', 'budget_force.py', FORCE,
     'int(self.grace * self.max_thinking)', 'int(9 * self.max_thinking)'),
    ('tries have no verdict', 'budget_force.py', FORCE,
     '"found": None, "correct": False}', '}'),
    ('the rarest answer wins', 'budget_force.py', FORCE,
     'if row["found"] is not None).most_common(1)',
     'if row["found"] is not None).most_common()[-1:]'),
    ('coverage is the first sample', 'budget_force.py', FORCE,
     '(row for row in rows if row["correct"])', '(row for row in rows)'),
    ('votes think for one', 'budget_force.py', FORCE,
     'row["found"] == votes[0][0])\n    return {**row, "thinking_tokens": sum(',
     'row["found"] == votes[0][0])\n    return {**row, "thinking_tokens": max('),
    ('a torn line of the journal', 'budget_force.py', PROGRAMS,
     'file.write("\\n" + json.dumps([index, row]))',
     'file.write(json.dumps([index, row]) + "\\n")'),
    ('a killed evaluation of two models is refused', 'budget_force.py', PROGRAMS,
     'and not args.overwrite and not draft.exists()', 'and not args.overwrite'),
    ('another evaluation goes on', 'budget_force.py', PROGRAMS,
     'if said.is_file() and said.read_text(encoding="utf-8") != text:', 'if False:'),
    ('what is done is asked again', 'budget_force.py', PROGRAMS,
     'if i not in done and i % self.world == self.rank', 'if i % self.world == self.rank'),
    ('each process asks all', 'budget_force.py', PROGRAMS,
     'if i not in done and i % self.world == self.rank', 'if i not in done'),
    ("the others' rows are lost", 'budget_force.py', PROGRAMS,
     'glob(f"{run}.*.jsonl")', 'glob(f"{run}.{self.rank}.jsonl")'),
    ('asking is forced too', 'budget_force.py', PROGRAMS,
     '"tokens": Method("tokens", False)', '"tokens": Method("tokens")'),
    ('control counts nothing', 'budget_force.py', FORCE,
     'return tokens <= self.max_thinking', 'return True'),
    ('the axis is not doublings', 'budget_force.py', FORCE,
     'axis=math.log2, least', 'axis=math.log, least'),
    ('pairs that are one point', 'budget_force.py', FORCE,
     'if math.log2(b / a) > least]', 'if b > a]'),
    ('a one-sided sign test', 'budget_force.py', FORCE,
     'min(1.0, 2 * tail / 2 ** either)', 'min(1.0, tail / 2 ** either)'),
    ('the text behind thinking', 'budget_force.py', PROGRAMS,
     'chat.decode(row.tokens[thought.answer:len(row.tokens)',
     'chat.decode(row.tokens[:len(row.tokens)'),
    ('the old evaluation goes before the new one is there', 'budget_force.py', PROGRAMS,
     'draft = directory.with_name(directory.name + ".new")\n',
     'draft = directory.with_name(directory.name + ".new")\n'
     '    shutil.rmtree(directory, ignore_errors=True)\n'),
    ('an evaluation is written into the old one', 'budget_force.py', PROGRAMS,
     '    shutil.rmtree(directory, ignore_errors=True)\n    draft.rename(directory)\n',
     '    shutil.copytree(draft, directory, dirs_exist_ok=True)\n'),
]


def lives(mutant):
    """Do the tests pass on a broken copy? None where the line is not there once."""
    name, file, tests, line, broken = mutant
    text = (ROOT / file).read_text(encoding="utf-8")
    if text.count(line) != 1:
        return None
    with tempfile.TemporaryDirectory() as copy:
        for part in ("assets", "tests", *(path.name for path in ROOT.glob("*.py"))):
            copied = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copied(ROOT / part, Path(copy, part))
        Path(copy, file).write_text(text.replace(line, broken), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", tests], cwd=copy,
                capture_output=True, timeout=300)
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
