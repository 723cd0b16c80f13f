"""The transformer: tensors in, tensors out; it knows no text.

In:   token ids (B, T), and a directory of weights in the Hugging Face layout.
Out:  logits, or the summed loss of the supervised tokens; and the same directory layout back.

Map:  Config        what config.json says, under its own names
      the pieces    RMSNorm, rotary positions, Attention, MLP, Block
      KVCache       the keys and values of rows that are being sampled
      the loss      linear layer and cross-entropy in one pass, never the whole logits
      Transformer   one forward for packed training, prefill and ragged decoding; load and save
      Directories   config.json and safetensors files, read with care

Parameter names are Hugging Face's, so each tensor of a checkpoint goes to the parameter of its
name, and one that is missing or left over is refused.
Shapes in comments: B rows, T tokens of a row, C hidden size, H query heads, K key-value heads,
D width of a head, L places of the cache, V vocabulary, N supervised tokens.
"""
import itertools
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint


class BadModel(ValueError):
    """A model's directory that cannot be used; the message is one line for a person."""


# ---- Config ---------------------------------------------------------------------------------

# How the families differ: biases on q, k and v; norms on each head of q and k; the width of a head
# where config.json is silent (None: hidden_size / num_attention_heads).
ARCHITECTURES = {"qwen2": {"qkv_bias": True, "qk_norm": False, "head_dim": None},
                 "qwen3": {"qkv_bias": False, "qk_norm": True, "head_dim": 128},
                 "llama": {"qkv_bias": False, "qk_norm": False, "head_dim": None}}
# Beyond these a number is broken, not large: no machine's integer, or nothing to be built.
HIGHEST, MOST_LAYERS, LARGEST_MATRIX = 1e18, 512, 2**40
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class Config:
    """The keys of config.json that shape the computation; the others are kept in `rest`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    model_type: str = "qwen2"
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # None, or Llama 3's: see `rotary`
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    rest: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        """BadModel where this file cannot compute what is asked for."""
        if self.model_type not in ARCHITECTURES:
            raise BadModel(f"model_type {self.model_type!r} is not known here "
                           f"(known: {', '.join(ARCHITECTURES)})")
        family = ARCHITECTURES[self.model_type]
        self.qkv_bias, self.qk_norm = family["qkv_bias"], family["qk_norm"]
        for f in fields(self):
            value, number = getattr(self, f.name), f.type in (int, float)
            if number and (type(value) not in (int, f.type) or not 0 < value < HIGHEST):
                raise BadModel(f"{f.name} is {value!r}, not a number above 0")
            if f.type is bool and type(value) is not bool:
                raise BadModel(f"{f.name} is {value!r}, not true or false")
        self.head_dim = (self.head_dim or family["head_dim"]
                         or self.hidden_size // self.num_attention_heads)
        if type(self.head_dim) is not int or self.head_dim < 2 or self.head_dim % 2:
            raise BadModel(f"head_dim is {self.head_dim!r}, not an even number above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise BadModel(f"{self.num_attention_heads} query heads do not share "
                           f"{self.num_key_value_heads} key-value heads evenly")
        widest = max(self.vocab_size, self.intermediate_size,
                     self.num_attention_heads * self.head_dim)
        if self.num_hidden_layers > MOST_LAYERS or self.hidden_size * widest > LARGEST_MATRIX:
            raise BadModel(f"{self.num_hidden_layers} layers with matrices of {self.hidden_size} "
                           f"times {widest} numbers are no model")
        for key in LLAMA3_ROPE if self.rope_scaling else ():
            value = self.rope_scaling.get(key)
            if type(value) not in (int, float) or not 0 < value < HIGHEST:
                raise BadModel(f"rope_scaling has no number {key}")
        if self.rope_scaling and not (self.rope_scaling["low_freq_factor"]
                                      < self.rope_scaling["high_freq_factor"]):
            raise BadModel("rope_scaling: low_freq_factor is not below high_freq_factor")

    def to_dict(self):
        """What config.json is to hold: our keys, and those that came with them."""
        ours = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rest"}
        return {**self.rest, **ours}


# ---- The pieces -----------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary(positions, config):
    """cos and sin, each (B, 1, T, D), in float32: pair i of a head turns theta^(-2i/D) a position.

    Llama 3 stretches this for long contexts: a pair that turns around less than `low_freq_factor`
    times in the length it was first trained on turns `factor` times slower, one that turns more
    than `high_freq_factor` times as before, and in between it is interpolated.
    The angles of late positions have no place in bf16, so they are computed here and cast later.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)             # (D/2,)
    if llama3 := config.rope_scaling:
        low, high = llama3["low_freq_factor"], llama3["high_freq_factor"]
        turns = frequencies * llama3["original_max_position_embeddings"] / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / llama3["factor"])
    angles = positions[:, None, :, None].float() * frequencies               # (B, 1, T, D/2)
    angles = torch.cat((angles, angles), dim=-1)                             # (B, 1, T, D)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) of (B, heads, T, D) by its angle: Hugging Face's pairs."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def attend_packed(q, k, v, lengths):
    """Causal attention within each document of a packed row: q (1, H, T, D), k and v (1, K, T, D).

    A document at a time, because no document may see another, and because the work is then the
    sum of the squares of the lengths and not the square of the sum:

        keys    1 1 1 2 2
        query 1 x
              1 x x
              1 x x x
              2       x
              2       x x
    """
    pieces = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2))
    return torch.cat([F.scaled_dot_product_attention(*piece, is_causal=True, enable_gqa=True)
                      for piece in pieces], dim=2)


def attend_cached(q, k, v, mask):
    """Attention to the filled places of a cache: k, v (B, K, L, D), mask (B, 1, T, L) True sees."""
    B, H, T, D = q.shape
    if T > 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    # One new token: the H/K query heads that share a key head stand in as H/K queries of one head,
    # so that no key or value is copied.
    q = q.reshape(B, k.shape[1], -1, D)                                      # (B, K, H/K, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H, T, D)


class Attention(nn.Module):
    """Causal attention in which H query heads share K key-value heads (Ainslie et al., 2023).

    `rope`: cos and sin of the positions. Then either the `lengths` of packed documents, or
    `cached`: this layer's pair k, v of the cache, the places (B, T) that the new keys and values
    take in it, and the mask (B, 1, T, L) of the places that each query sees.
    """

    def __init__(self, config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, lengths, cached):
        B, T, _ = x.shape
        q, k, v = (projection(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H or K, T, D)
                   for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        if cached is None:
            y = attend_packed(q, k, v, lengths)
        else:
            layer, places, mask = cached
            k, v = (write(old, new, places)[:, :, :mask.shape[-1]]              # (B, K, L, D)
                    for old, new in zip(layer, (k, v)))
            y = attend_cached(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU (Shazeer, 2020)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x (B, T, C) to (B, T, C): attention, then MLP, each added to what it read through a norm."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rope, lengths=None, cached=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, lengths, cached)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- The cache ------------------------------------------------------------------------------


class KVCache:
    """Keys and values of `slots` rows with `length` places each, and how many places are filled.

    The cache owns the position: `forward` puts the next T tokens of row b at the places
    filled[b], filled[b] + 1, ... and moves filled[b] on. Setting filled[b] = 0 frees a row; nothing
    is erased.
    """

    def __init__(self, layers, filled):
        self.layers = layers                        # of each a pair k, v: (slots, K, length, D)
        self.filled = filled                        # (slots,), on the CPU

    @classmethod
    def empty(cls, config, slots, length, dtype=torch.float32, device="cpu"):
        """A cache for `slots` rows of at most `length` tokens: 2 * layers * slots * length * K * D
        numbers. s1's 32B model in bf16 takes 2 * 64 * 8 * 128 * 2 bytes = 262 KB a token."""
        shape = (slots, config.num_key_value_heads, length, config.head_dim)
        return cls([tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")
                    for _ in range(config.num_hidden_layers)], torch.zeros(slots, dtype=torch.long))

    def rows(self, first, end):
        """The slots from `first` up to `end` alone, over the same memory."""
        return KVCache([(k[first:end], v[first:end]) for k, v in self.layers],
                       self.filled[first:end])

    def move(self, source, target):
        """Put the row in slot `source` into slot `target`."""
        n = self.filled[target] = self.filled[source]
        for tensor in itertools.chain(*self.layers):
            tensor[target, :, :n] = tensor[source, :, :n]

    def claim(self, T):
        """The next T places of each row, (B, T), and which places its tokens see, (B, 1, T, L);
        they count as filled. IndexError where they do not fit."""
        (k, _), end = self.layers[0], int(self.filled.max()) + T
        if end > k.shape[2]:
            raise IndexError(f"the cache has {k.shape[2]} places a row, not {end}")
        places = (self.filled[:, None] + torch.arange(T)).to(k.device)
        self.filled += T
        return places, torch.arange(end, device=k.device) <= places[:, None, :, None]


def write(cached, new, places):
    """Put keys or values (B, K, T, D) at their places (B, T) of a layer's (B, K, length, D)."""
    rows = torch.arange(new.shape[0], device=new.device)[:, None]
    cached[rows, :, places] = new.transpose(1, 2).to(cached.dtype)
    return cached


# ---- The loss -------------------------------------------------------------------------------


def softmax_step(logits, targets, room=None):
    """The summed loss of a chunk; its logits (n, V) become their gradient: softmax minus one-hot.

    It is taken in float32, in `room` (n, V); a compiled kernel needs none. Returned beside the loss
    is what the targets lack, p[target] - 1, (n, 1), as float32 has it.
    """
    top, t = logits.amax(1).float(), targets[:, None]
    wanted = logits.gather(1, t)[:, 0].float()
    p = (torch.softmax(logits.float(), 1) if room is None
         else torch.softmax(room.copy_(logits), 1, out=room))
    # log Z = max - log p_max, for p_max = exp(max) / Z; it is never below 1/V.
    loss = (top - p.amax(1).log() - wanted).sum()
    lacking = p.gather(1, t) - 1
    # By index, here and below: scatter_ copies on a CPU, and the whole pass is half as slow again.
    logits.copy_(p)[torch.arange(len(t), device=t.device), targets] = lacking[:, 0].to(logits.dtype)
    return loss, lacking


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(hidden @ weight.T)[target], both gradients in the same pass.

    hidden (N, C), weight (V, C), targets (N,), all supervised. The logits of a batch are its
    largest tensor by far: 16,384 rows times Qwen's 151,936 words are 5 GB in bf16, and as much
    again in float32 for the softmax. So a chunk of rows at a time:

        hidden            logits = hidden[chunk] @ weight.T    (n, V), the only large tensor
        | chunk 1 |  -->  p = softmax(logits), in float32
        | chunk 2 |       loss   += -log p[target]
        | chunk 3 |       p[target] -= 1                       d loss / d logits
                          grad_hidden[chunk] = p @ weight
                          grad_weight += p.T @ hidden[chunk]   summed in float32

    Both gradients are ready when forward ends, and backward only scales them. A sum and not a
    mean: the caller alone knows how many tokens the optimizer step has in all.

    In bf16 each product is rounded before it is summed, and most of a word's gradient comes from
    the few rows it is the target of: these are left out of the product and added in float32. Large
    tensors are made once and used by every chunk, for fresh memory costs more than the arithmetic;
    and grad_weight grows by a slice of the vocabulary at a time, small enough for a CPU's cache.
    """
    compiled = False                    # --compile: `softmax_step` as one kernel

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_bytes=None):
        (N, C), V, on_cpu = hidden.shape, weight.shape[0], hidden.device.type == "cpu"
        chunk_bytes = chunk_bytes or (2**25 if on_cpu else 2**30)
        rows = max(1, min(N, chunk_bytes // (4 * V)))   # the float32 softmax is what fills a chunk
        words = min(V, 4096 if on_cpu else 16384)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        # The master weight may be float32 while the rows are bf16 (autocast): multiply in theirs.
        w = weight.to(hidden.dtype)
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        all_logits, part = hidden.new_empty(rows, V), hidden.new_empty(words, C)
        step, room = softmax_step, all_logits.new_empty(rows, V, dtype=torch.float32)
        if FusedLinearCrossEntropy.compiled:
            step, room = torch.compile(step, dynamic=True), None
        for start in range(0, N, rows):
            h, t = hidden[start:start + rows], targets[start:start + rows]   # (n, C), (n,)
            logits = torch.mm(h, w.T, out=all_logits[:len(h)])               # (n, V)
            summed, lacking = step(logits, t, None if room is None else room[:len(h)])
            loss += summed
            if wants_hidden:
                torch.mm(logits, w, out=grad_hidden[start:start + rows])
            if wants_weight:
                logits[torch.arange(len(t), device=t.device), t] = 0
                for v in range(0, V, words):
                    p = logits[:, v:v + words]                               # (n, words)
                    grad_weight[v:v + words] += torch.mm(p.T, h, out=part[:p.shape[1]])
                grad_weight.index_add_(0, t, lacking * h)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss       # 0-dim: the dtype stays, 1/N unrounded
        if grad_weight is not None:
            scaled = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            for ours, out in zip(grad_weight.split(4096), scaled.split(4096)):
                out.copy_(ours * grad_loss)                 # no second copy in float32
            grad_weight = scaled
        return grad_hidden, grad_weight, None, None


# ---- The transformer ------------------------------------------------------------------------


class Transformer(nn.Module):
    """A decoder of the Qwen2, Qwen3 or Llama family."""

    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, False
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:      # a tied model owns no lm_head
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids, positions=None, lengths=None, targets=None, cache=None):
        """One forward for three uses.

        ids (B, T). Packed training: B = 1, `lengths` the documents' lengths in the row, `positions`
        (1, T) starting again at 0 in each, `targets` (B, T) the token to be predicted at each
        place, -100 for none. Prefill and decode: `cache`, which also knows the positions.

        Returns logits (B, T, V); with `targets` instead (the summed loss, the number N of
        supervised tokens), N a plain int. Targets that lie on the CPU cost no synchronisation.
        """
        B, T = ids.shape
        if cache is not None:
            return self.logits(ids, *cache.claim(T), cache.layers)
        if positions is None:
            positions = torch.arange(T, device=ids.device).expand(B, T)
        x = self.hidden_states(ids, positions, lengths=lengths or [T])       # (B, T, C)
        if targets is None:
            return F.linear(x, self.head)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        targets = targets.flatten()
        supervised = (targets != -100).nonzero()[:, 0]                       # (N,)
        hidden = x.flatten(0, 1)[supervised.to(x.device)]                    # (N, C)
        loss = FusedLinearCrossEntropy.apply(hidden, self.head, targets[supervised].to(x.device))
        return loss, len(supervised)

    def hidden_states(self, ids, positions, mask=None, layers=None, lengths=None):
        """What the head reads, (B, T, C); with a cache its `layers`, which take the new keys and
        values in, and the `mask` of what is seen of them. Tensors alone, so that torch.compile
        makes one step of it."""
        rope = rotary(positions, self.config)
        x = self.model.embed_tokens(ids)                                     # (B, T, C)
        for i, block in enumerate(self.model.layers):
            cached = (layers[i], positions, mask) if layers else None
            if self.recompute:      # keep a block's input alone, and run it again in backward
                x = checkpoint(block, x, rope, lengths, use_reentrant=False)
            else:
                x = block(x, rope, lengths, cached)
        return self.model.norm(x)

    def logits(self, ids, positions, mask, layers):
        """(B, T, V): one step over a cache, which `KVCache.claim` prepares."""
        return F.linear(self.hidden_states(ids, positions, mask, layers), self.head)

    @property
    def head(self):
        """The weight of the last layer, (V, C); a tied model's is that of its embedding."""
        tied = self.config.tie_word_embeddings
        return (self.model.embed_tokens if tied else self.lm_head).weight

    def compile_kernels(self):
        """Let torch.compile fuse what lies between the matrix products. Attention stays as it is:
        its documents have other lengths in each row."""
        FusedLinearCrossEntropy.compiled = True
        for block in self.model.layers:
            for part in (block.mlp, block.input_layernorm, block.post_attention_layernorm):
                part.compile(dynamic=True)

    def init_weights(self, seed):
        """Random weights for a start from nothing: normal, residual paths scaled down (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * self.config.num_hidden_layers) ** -0.5 if deep else 1.0
                nn.init.normal_(p, std=std * scale, generator=generator)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        return self

    @classmethod
    def load(cls, directory, dtype=torch.float32, device="cpu", prepare=None):
        """The model in a Hugging Face directory, its weights in `dtype` on `device`; else BadModel.

        The files are mapped, not read: each tensor goes from the file to its place, and there is
        no second copy of the model. `prepare` may share it out over processes (`fully_shard`)
        before it has any memory; each process then reads its own rows.
        """
        with torch.device("meta"):
            model = cls(read_config(directory)).to(dtype)
        found = stored_tensors(Path(directory))
        if model.config.tie_word_embeddings:
            found.pop("lm_head.weight", None)
        refuse_other_tensors(directory, model.state_dict(), found)
        if prepare:
            prepare(model)
        model.to_empty(device=device)
        for name, place in model.state_dict().items():
            put(place, found[name])
        return model

    def save(self, directory, dtype=None, shard_bytes=5e9):
        """Write config.json and the weights, in their own `dtype` or another, into a directory that
        is there: one safetensors file, or shards and their index where it would be larger. Of
        several processes that share the model, all call this; those with None write nothing."""
        shards, size = [{}], 0
        for name, p in self.state_dict().items():
            dtype = dtype or p.dtype
            size += p.numel() * dtype.itemsize
            if size > shard_bytes and shards[-1]:
                shards, size = [*shards, {}], p.numel() * dtype.itemsize
            shards[-1][name] = p
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = ["model.safetensors"]
        elif directory:
            total = sum(p.numel() * dtype.itemsize for p in self.parameters())
            index = {"metadata": {"total_size": total},
                     "weight_map": {k: name for name, shard in zip(names, shards) for k in shard}}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for name, shard in zip(names, shards):
            state = {key: whole(p).to("cpu", dtype).contiguous() for key, p in shard.items()}
            if directory:
                safetensors.torch.save_file(state, directory / name, metadata={"format": "pt"})
        if not directory:
            return
        said = str(dtype).removeprefix("torch.")
        config = {**self.config.to_dict(), "dtype": said, "torch_dtype": said}  # newer, older name
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---- Directories ----------------------------------------------------------------------------
# What stands in a directory comes from anywhere: it is read as JSON and safetensors, nothing in it
# is executed, and what this file cannot compute is refused by name.

INDEX = "model.safetensors.index.json"


def read_config(directory):
    """The Config of `directory`/config.json, its rope in the older or the newer layout. BadModel
    where it is none, or asks for what this file cannot compute."""
    path = Path(directory) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadModel(f"{directory} is no model: there is no config.json in it") from None
    except (ValueError, RecursionError) as error:
        raise BadModel(f"{path} is no JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BadModel(f"{path} holds no object")
    known = {f.name for f in fields(Config)} - {"rest"}
    rest = {key: raw[key] for key in raw.keys() - known}
    try:
        refuse(raw)
        return Config(**{key: raw[key] for key in known & raw.keys()} | rope_of(raw), rest=rest)
    except (BadModel, TypeError) as error:
        raise BadModel(f"{path}: {error}") from None


def refuse(raw):
    """BadModel by the name of what a config.json asks for and is not computed here."""
    if raw.get("model_type") not in ARCHITECTURES:
        raise BadModel(f"model_type {raw.get('model_type')!r} is not known here "
                       f"(known: {', '.join(ARCHITECTURES)})")
    if raw.get("hidden_act", "silu") != "silu":
        raise BadModel(f"hidden_act {raw['hidden_act']!r} is not known here (known: silu)")
    layers = raw.get("layer_types") or []
    if raw.get("use_sliding_window") or "sliding_attention" in layers:
        raise BadModel("a sliding window is not supported")
    for key in ("quantization_config", "attention_bias", "mlp_bias"):
        if raw.get(key):
            raise BadModel(f"{key} is not supported")


def rope_of(raw):
    """rope_theta and rope_scaling from `rope_parameters`, or from their older places."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise BadModel(f"the rope is {rope!r}, not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise BadModel(f"rope type {kind!r} is not known here (known: default, llama3)")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    return {"rope_theta": theta, "rope_scaling": rope if kind == "llama3" else None}


def stored_tensors(directory):
    """{name: a slice of its file, read when it is indexed} of all tensors of a directory."""
    return {name: file.get_slice(name) for file in open_weights(directory) for name in file.keys()
            if not name.endswith("rotary_emb.inv_freq")}        # old checkpoints: computed here


def refuse_other_tensors(directory, wanted, found):
    """BadModel where the tensors of the files are not just those of the model."""
    wrong = {"missing": wanted.keys() - found.keys(), "extra": found.keys() - wanted.keys(),
             "of another shape": {name for name in wanted.keys() & found.keys()
                                  if found[name].get_shape() != list(wanted[name].shape)},
             "quantised": {name for name in found
                           if found[name].get_dtype() not in ("F32", "F16", "BF16")}}
    if any(wrong.values()):
        raise BadModel(f"{directory} does not fit its config.json: " + "; ".join(
            f"{why} {', '.join(sorted(names))}" for why, names in wrong.items() if names))


def open_weights(directory):
    """The safetensors files of a directory, opened; BadModel says what is wrong with them."""
    paths = [directory / "model.safetensors"]
    if not paths[0].is_file():
        if not (directory / INDEX).is_file():
            pickles = any(directory.glob("*.bin"))
            only = "only pickles (*.bin), which are never opened" if pickles else "none"
            raise BadModel(f"{directory} has no weights in safetensors files: {only}")
        try:
            text = (directory / INDEX).read_text(encoding="utf-8")
            names = set(json.loads(text)["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise BadModel(f"{directory / INDEX} is no index of shards") from None
        for name in names:
            plain = type(name) is str and Path(name).name == name and name.endswith(".safetensors")
            if not plain or not name.isprintable():         # a NUL, or half a surrogate pair
                raise BadModel(f"{directory / INDEX}: {name!r} is no plain name of a file")
        paths = [directory / name for name in sorted(names)]
    files = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                if file.read(20) == b"version https://git-":
                    raise BadModel(f"{path} is a Git LFS pointer, not the weights: `git lfs pull`")
            files.append(safetensors.safe_open(path, framework="pt"))
        except (safetensors.SafetensorError, OSError) as error:
            raise BadModel(f"{path} cannot be read: {error}") from None
    return files


def whole(tensor):
    """The tensor itself, or put together from the rows that several processes hold."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def put(place, source):
    """Copy a tensor of a file (safetensors' slice) into its place; of shared ones our own rows."""
    if isinstance(place, DTensor):
        mesh, place = place.device_mesh, place.to_local()
        rows = -(-source.get_shape()[0] // mesh.size())             # as torch.chunk deals them out
        start = min(mesh.get_local_rank() * rows, source.get_shape()[0])
        place.copy_(source[start:start + len(place)])
    else:
        place.copy_(source[:])
