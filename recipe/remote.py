"""A sampler on a vLLM server, so that budget_force.py evaluates models of any size.

    request: prompt             the server samples:  a b END
    replay:  Budget gets        a, b, END            and returns  a, b, Wait
    request: prompt a b Wait    the server samples:  c END

What the server sampled after a token that the controller changes is dropped. vLLM's prefix cache
holds the tokens before it, so a `Wait` costs its own tokens.
"""
import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Iterator

import data
from recipe import cli
from sample import Sequence, check_finished, make_sequences

# Without these the server takes the values of the model's generation_config.json.
SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0}


class RemoteSampler:
    """Generates like `sample.Sampler`, with up to `max_num_seqs` requests at a time."""

    def __init__(self, base_url: str, model: str, max_num_seqs: int = 64,
                 max_seq_len: int = 2**20, allow_http: bool = False):
        self.key = os.environ.get("VLLM_API_KEY", "").strip()       # `vllm serve` reads it too
        self.base_url = cli.check_url(base_url, allow_http or not self.key)
        self.model, self.max_num_seqs = model, max_num_seqs
        self.max_seq_len = min(max_seq_len, asyncio.run(self.served_length()) or max_seq_len)

    def generate(self, prompts: list[list[int]], controller: Callable | None = None,
                 samples: int = 1, max_new_tokens: int | None = None, stop_ids: Collection = (),
                 seed: int = 0, repeats: int = 0, **sampling_params) -> Iterator[Sequence]:
        """Yields what `sample.Sampler.generate` does; above temperature 0 from other draws."""
        async def complete(seq: Sequence) -> Sequence:
            while not seq.finish_reason:
                tokens = [None] if seq.queue else await self.sample_tokens(
                    client, seq, controller, stop_ids, max_new_tokens, sampling_params)
                for token in tokens:
                    seq.append_token(token, controller)
                    seq.finish_reason = check_finished(
                        seq, stop_ids, max_new_tokens, self.max_seq_len, repeats)
                    if seq.finish_reason or seq.queue or seq.forced[-1]:
                        break                       # the server's next token follows another one
            return seq

        waiting, running = make_sequences(prompts, samples, seed, self.max_seq_len), set()
        client = self.connect()
        with asyncio.Runner() as runner:            # cancels what is running when it is left
            while waiting or running:
                while waiting and len(running) < self.max_num_seqs:
                    running.add(runner.get_loop().create_task(complete(waiting.popleft())))
                done, running = runner.run(asyncio.wait(running, return_when="FIRST_COMPLETED"))
                for task in sorted(done, key=lambda task: task.exception() is not None):
                    yield task.result()             # an error comes after all results
            runner.run(client.close())

    async def sample_tokens(self, client, seq, controller, stop_ids, max_new_tokens,
                            sampling_params) -> list[int]:
        """One token or more by the server, up to a stop or to what the controller may change."""
        limit, stops, stop = max_new_tokens or self.max_seq_len, set(stop_ids), None
        limit = min(limit, self.max_seq_len - len(seq.prompt)) - len(seq.tokens)
        if hasattr(controller, "max_new_tokens"):   # a Budget
            limit = max(1, min(limit, controller.max_new_tokens(seq) + 1))
            stops |= controller.chat.end_ids
            stop = controller.chat.closing_text or None
        body = {"model": self.model, "prompt": seq.prompt + seq.tokens, "return_token_ids": True,
                **SAMPLING, **sampling_params, "seed": seq.rng.getrandbits(32),
                "ignore_eos": True, "stop_token_ids": sorted(stops), "stop": stop,
                "logit_bias": {str(token): -100 for token in seq.banned},
                "max_tokens": 1 if seq.banned else limit}       # a ban is for one token
        match await self.reply(client.post("/completions", body=body, cast_to=object)):
            case {"choices": [{"token_ids": [int(), *_] as tokens}]}:
                return tokens
        raise ValueError(f"{self.base_url} returns no token ids; vLLM does from 0.10.2 on")

    async def served_length(self) -> int | None:
        """How many tokens the server allows in a sequence; ValueError for an unknown model."""
        lengths = {}
        async with self.connect() as client:
            match await self.reply(client.get("/models", cast_to=object)):
                case {"data": [{"id": str()}, *_] as models}:
                    lengths = {model["id"]: model.get("max_model_len") for model in models}
        if self.model not in lengths:
            raise ValueError(f"{self.base_url} has no model {self.model!r}, only: "
                             f"{', '.join(lengths)} (--served-model-name)")
        return lengths[self.model]

    async def reply(self, request: Awaitable) -> object:
        """What a request returns; ValueError if it fails."""
        try:
            return await request
        except Exception as error:                  # the library raises a dozen kinds
            raise ValueError(f"{self.base_url}: {error} {error.__cause__ or ''}") from None

    def connect(self):
        """An AsyncOpenAI that follows no redirect, so that the key goes to no other host."""
        try:
            import openai
        except ImportError:
            raise ImportError("--base-url needs openai: pip install openai") from None
        http_client = openai.DefaultAsyncHttpxClient(
            follow_redirects=False, trust_env=self.base_url.startswith("https"))    # its proxies
        return openai.AsyncOpenAI(api_key=self.key or "none", base_url=self.base_url,
                                  timeout=openai.Timeout(3600, connect=10), http_client=http_client)


def load_sampler(name: str, args, max_num_seqs: int | None) -> tuple[RemoteSampler, data.Chat]:
    """A sampler on the server at --base-url, and the chat: only the tokenizer is here."""
    chat = data.Chat(cli.resolve_model(name, weights=False), args.system, args.thinking)
    return RemoteSampler(args.base_url, args.served_model_name or name, max_num_seqs or 64,
                         args.max_seq_len, args.allow_http), chat


def load_chat(name: str, args) -> tuple[data.Chat, int]:
    """The chat of a model, and how many tokens its server takes at most."""
    sampler, chat = load_sampler(name, args, 1)
    return chat, sampler.max_seq_len
