r"""Asks a reasoning model behind any OpenAI-compatible API for traces.

    python -m recipe.teacher --questions q.jsonl --base-url https://api.deepseek.com/v1 \
        --model deepseek-reasoner --usd-in 0.55 --usd-out 2.19 --max-usd 20 --out traces.jsonl

Each answer is a line of OUT. The same command skips what is answered and asks again what is in
OUT.failed.jsonl. Exit code 1: some questions have no answer; 2: no question can be asked.
"""
import argparse
import asyncio
import json
import math
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm

from recipe.cli import LOOPBACK, ArgumentParser, at_least, check_url, exit_on_user_error
from recipe.grading import grade
from recipe.rows import (
    OPEN,
    TAG,
    add_row_arguments,
    append_jsonl,
    load_questions,
    open_jsonl,
    request_key,
    split_thinking,
    trace_row,
)

KEYS = ("TEACHER_API_KEY", "OPENAI_API_KEY")        # environment variables; the first one counts
FATAL = (301, 302, 303, 307, 308, 401, 402, 404)    # every other question would get it as well
FINISH = {"stop": "stop", "eos": "stop", "eos_token": "stop", "end_turn": "stop",
          "length": "length", "max_tokens": "length", "none": None}
THINKING = ("reasoning", "reasoning_content", "reasoning_details")      # beside the content
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass
class Run:
    """What the questions share."""
    args: argparse.Namespace
    key: str                    # of the API
    file: BinaryIO | None = None
    failures: BinaryIO | None = None
    body: dict = field(default_factory=dict)    # of every request, beside model and messages
    jobs: dict[str, dict] = field(default_factory=dict)     # by the keys of the rows to come
    worst_case: float = 0.0     # dollars that one try can cost
    spent: float = 0.0          # dollars, with the worst case of each question under way
    tokens: int = 0
    answered: int = 0
    failed: int = 0
    fatal: str = ""             # the failure that ends the run

    def dollars(self, read: int, written: int) -> float:
        return (read * self.args.usd_in + written * self.args.usd_out) / 1e6

    def charge(self, reply: Any) -> None:
        """Adds the tokens and dollars of a reply; the worst case if it does not report them."""
        cost = self.worst_case
        with suppress(LookupError, TypeError):
            # Gemini counts its thoughts in the total only.
            read, total = reply["usage"]["prompt_tokens"], reply["usage"]["total_tokens"]
            if 0 <= read <= total < 1e9:
                cost = self.dollars(read, total - read)
                self.tokens += total
        self.spent += cost

    def redact(self, row: dict) -> dict:
        """Returns the row without the key, which a server may echo. A short key, such as "ollama",
        is no secret and may be a word of the text."""
        text = json.dumps(row)
        return json.loads(text.replace(self.key, "[key]")) if len(self.key) > 7 else row

    def record(self, job: dict, text: str, seconds: float) -> None:
        """Writes the row of a reply; ValueError if the reply is not an answer."""
        reply = None
        with suppress(LookupError, TypeError, AttributeError, RecursionError):
            reply = parse_reply(text)
        self.charge(reply)
        thinking, answer, finish = read_reply(reply)
        row = trace_row(job, thinking, answer, finish, model=reply.get("model"),
                        usage=reply.get("usage"), seconds=round(seconds, 3),
                        sample=job["sample"], key=job["key"])
        if TAG.search(thinking + answer):
            row.setdefault("unfit", "thinking tag")
        if isinstance(job["answer"], str):
            row["correct"] = grade(row["answer"], job["answer"])
        append_jsonl(self.file, self.redact(row))
        self.answered += 1

    def fail(self, job: dict, reason: str, raw: str, status: int = 0) -> None:
        """Writes why a question has no answer, and what came instead."""
        row = self.redact(job | {"error": f"{reason} {raw}", "raw": raw})
        row |= {"error": " ".join(row["error"].split())[:300], "raw": row["raw"][:1_000_000]}
        append_jsonl(self.failures, row)
        self.failed += 1
        if status in FATAL or self.failed >= 10 and not self.answered:
            self.fatal = row["error"]

    def __str__(self) -> str:
        return f"{self.failed} failed, {self.tokens:,} tokens, ${self.spent:.2f}"


async def ask_all(run: Run) -> int:
    """Asks all questions that have no answer yet; returns the exit code."""
    client = make_client(run)
    run.file, done = open_jsonl(run.args.out)
    run.failures = open(f"{run.args.out}.failed.jsonl", "wb")
    for row in done.values():
        run.charge(row.get("teacher"))
    todo = [job for key, job in run.jobs.items() if key not in done]
    bar = tqdm(total=len(run.jobs), initial=len(run.jobs) - len(todo), unit="row",
               mininterval=0.1 if sys.stderr.isatty() else 30)
    with run.file, run.failures, bar:
        async with client:
            await asyncio.gather(*(work(run, client, todo, bar) for _ in range(run.args.workers)))
    if run.fatal:
        raise ValueError(f"the teacher gives no answers: {run.fatal}")
    stopped = f"; stopped before ${run.args.max_usd:g} is passed" if todo else ""
    print(f"{run.args.out}: {bar.n} of {bar.total} answered, {run}{stopped}")
    return int(bar.n < bar.total)


async def work(run: Run, client: Any, todo: list[dict], bar: tqdm) -> None:
    """Asks one question after another, and writes the answers and failures."""
    import openai
    # The remaining dollars only shrink, so a worker ends when they do not cover another question.
    while todo and not run.fatal and run.spent + run.worst_case <= run.args.max_usd:
        job = todo.pop(0)
        run.spent += run.worst_case
        start, text = time.monotonic(), ""
        try:
            async with asyncio.timeout(run.args.deadline):      # of all tries together
                response = await client.chat.completions.with_raw_response.create(
                    model=run.args.model, messages=[{"role": "user", "content": job["text"]}],
                    extra_body=run.body)
            text = response.http_response.text
            run.record(job, text, time.monotonic() - start)
        except openai.APIStatusError as error:
            status = error.status_code
            run.fail(job, f"HTTP {status}:", error.response.text, status)
        except (openai.OpenAIError, TimeoutError, ValueError) as error:
            run.fail(job, f"{error!r} {error.__cause__ or ''}", text)
        run.spent -= run.worst_case
        bar.set_postfix_str(str(run), refresh=False)
        bar.update(bar.initial + run.answered - bar.n)


def make_client(run: Run) -> Any:
    """Returns an AsyncOpenAI that follows no redirect, so that the key goes to no other host. The
    environment's proxies (HTTPS_PROXY) apply, except to a server on this machine."""
    try:
        import openai
    except ImportError:
        raise ImportError("asking a teacher needs openai: pip install openai") from None

    class Client(openai.DefaultAsyncHttpxClient):
        async def send(self, request, **options):
            """Sends one of the SDK's tries. A try whose reply is lost may be billed."""
            if run.spent > run.args.max_usd:
                raise openai.OpenAIError("--max-usd allows no further try")
            try:
                return await super().send(request, **options)
            except BaseException as error:      # the deadline's CancelledError too
                if "Connect" not in type(error).__name__:
                    run.spent += run.worst_case
                raise

    trust_env = urlsplit(run.args.base_url).hostname not in LOOPBACK
    return openai.AsyncOpenAI(api_key=run.key or "none", base_url=run.args.base_url, max_retries=16,
                              http_client=Client(follow_redirects=False, trust_env=trust_env))


def prepare(args: argparse.Namespace) -> Run:
    """Returns the run that the arguments and the environment describe."""
    url = args.base_url = check_url(args.base_url, args.allow_http)
    body = {"max_tokens": args.max_tokens} | (STREAM if args.stream else {})
    if not isinstance(args.body, dict) or {"model", "messages", "n", "stream"} & args.body.keys():
        raise ValueError("--body is not a JSON object, or has model, messages, n or stream")
    if "googleapis.com" in url:             # Gemini returns its thoughts only if asked to
        marker = {"thought_tag_marker": "thought"} if "aiplatform" in url else {}      # Vertex AI
        body["extra_body"] = {"google": {"thinking_config": {"include_thoughts": True}} | marker}
    body = {name: value for name, value in (body | args.body).items() if value is not None}
    key = next((os.environ[name].strip() for name in KEYS if os.environ.get(name)), "")
    if not re.fullmatch(r"[!#-\[\]-~]*", key):
        raise ValueError(f"the key in {' or '.join(KEYS)} has characters that no key has")

    run = Run(args, key, body=body)
    questions = load_questions(args.questions, args.split, need_answer=False, columns=args.columns)
    for question in questions[:args.n]:
        text = "\n\n".join(filter(None, (question["question"], args.suffix)))
        request = {name: value for name, value in body.items() if name not in STREAM} | {
            "model": args.model, "messages": [{"role": "user", "content": text}]}
        for sample in range(args.samples):
            row_key = request_key(f"{url}/chat/completions", request, sample)
            run.jobs[row_key] = {**question, "sample": sample, "key": row_key, "text": text}

    max_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    if args.max_usd < math.inf and not (args.usd_in and args.usd_out and max_tokens):
        raise ValueError("--max-usd needs the prices, --usd-in and --usd-out, and max_tokens")
    longest = max(len(json.dumps(job)) for job in run.jobs.values())    # a token has a byte or more
    run.worst_case = run.dollars(longest, max_tokens)
    return run


def parse_reply(text: str) -> Any:
    """Returns the reply that is JSON, or that server-sent events add up to. A stream that is torn
    gives what came before, without a finish reason."""
    with suppress(ValueError):
        return json.loads(text)
    deltas, model, usage, finish, error = [], None, None, None, None
    with suppress(ValueError):                  # of [DONE], or where the stream is torn
        for data in re.findall(r"(?:^|[\r\n])data:([^\r\n]*)", text):
            event = json.loads(data)
            for choice in event.get("choices") or ():
                deltas.append(choice.get("delta") or {})
                finish = choice.get("finish_reason") or finish
            if finish:                          # what a server reports before is not all
                usage = event.get("usage") or usage
            model = model or event.get("model")
            error = error or event.get("error")
    message = {name: "".join(text_of(delta.get(name)) for delta in deltas)
               for name in ("content", *THINKING)}
    message["content"] = message["content"].replace("</think><think>", "")      # one of each part
    finish = f"error {error}" if error else finish
    return {"model": model, "usage": usage,
            "choices": [{"message": message, "finish_reason": finish}]}


def read_reply(reply: Any) -> tuple[str, str, str | None]:
    """Returns (thinking, answer, finish reason); ValueError if the reply is not an answer."""
    try:
        choice = reply["choices"][0]
        message, finish = choice["message"], str(choice.get("finish_reason"))
        answer = text_of(message.get("content"))
        thinking = next(filter(None, (text_of(message.get(name)) for name in THINKING)), "")
    except (LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError("the reply has no message that can be read") from None
    finish = FINISH.get(finish.lower(), finish)
    if finish not in ("stop", "length", None) or not answer.strip() and finish != "length":
        raise ValueError(f"the reply has no answer (finish reason: {finish})")
    if not thinking or re.match(rf"\s*{OPEN}", answer):
        tagged, answer = split_thinking(answer)
    return thinking or tagged, answer, finish


def text_of(value: Any) -> str:
    """Returns the text of a string, or of a list of parts, where tags surround the thinking."""
    if isinstance(value, list):
        return "".join(map(text_of, value))
    if isinstance(value, dict):
        thinking = text_of(value.get("thinking"))
        text = text_of(value.get("text") or value.get("summary"))
        return f"<think>{thinking}</think>" if thinking else text
    return value if isinstance(value, str) else ""


def main() -> None:
    parser = ArgumentParser(description="Ask a reasoning model behind an API for traces.")
    add = parser.add_argument
    add("--questions", required=True, help="questions, with reference answers or without")
    add_row_arguments(add)
    add("--base-url", required=True, help="of the API, such as https://api.deepseek.com/v1")
    add("--model", required=True, help="the teacher's name there")
    add("--out", required=True, help="file that the traces are appended to")
    add("--n", type=at_least(1), help="ask only the first n questions")
    add("--samples", type=at_least(1), default=1, help="answers to each question")
    add("--suffix", default="", help="text to append to each question")
    add("--max-tokens", type=at_least(1), default=32768, help="of thinking and answer together")
    add("--body", type=json.loads, default={}, help="more fields of the request (JSON)")
    add("--stream", action="store_true", help="for servers that only stream")
    add("--workers", type=at_least(1, maximum=1000), default=16, help="questions under way")
    add("--deadline", type=at_least(0.01, float), default=1800, help="seconds for all tries")
    add("--usd-in", type=at_least(0, float), default=0, help="dollars per million tokens read")
    add("--usd-out", type=at_least(0, float), default=0, help="dollars per million written")
    add("--max-usd", type=at_least(0, float), default=math.inf, help="never spend more")
    add("--allow-http", action="store_true", help="send key and questions unencrypted")
    args = parser.parse_args()
    with exit_on_user_error(args.debug):
        sys.exit(asyncio.run(ask_all(prepare(args))))


if __name__ == "__main__":
    main()
