"""A decoder-only transformer (Qwen2, Qwen3, Llama) with Hugging Face's parameter names.

Shapes in comments: B rows, T tokens of a row, C hidden size, H query heads, K key-value heads,
D head size, S cache slots, L cache positions, V vocabulary, N supervised tokens.
"""
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

SUPPORTED = {"model_type": ("qwen2", "qwen3", "llama"), "hidden_act": ("silu", None),
             "rope_type": ("default", "llama3"), "sliding_attention": (False,),
             "use_sliding_window": (False, None), "quantization_config": (None,),
             "attention_bias": (False, None), "mlp_bias": (False, None),
             "tie_word_embeddings": (True, False, None)}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class Config:
    """The keys of config.json that shape the computation (None: required); `extra` has the rest."""
    vocab_size: int = None
    hidden_size: int = None
    intermediate_size: int = None
    num_hidden_layers: int = None
    num_attention_heads: int = None
    num_key_value_heads: int = None
    model_type: str = "qwen2"
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None        # None or Llama 3's, see `rotary_embedding`
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    extra: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        rope = {key: self.rope_scaling.get(key) for key in LLAMA3_ROPE} if self.rope_scaling else {}
        numbers = [(f.name, getattr(self, f.name), f.type) for f in fields(self)
                   if f.type in (int, float)] + [(key, rope[key], float) for key in rope]
        for name, value, kind in numbers:
            limit = 1000 if name == "num_hidden_layers" else 2**31      # building more would hang
            if type(value) not in (int, kind) or not 0 < value < limit:
                raise ValueError(f"{name} is missing or not a valid {kind.__name__}: {value!r}")
        self.head_dim = self.head_dim or (
            128 if self.model_type == "qwen3" else self.hidden_size // self.num_attention_heads)
        if type(self.head_dim) is not int or self.head_dim not in range(2, 2**16, 2):
            raise ValueError(f"head_dim is {self.head_dim!r}, expected an even number above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads is not a multiple of num_key_value_heads")

    def to_dict(self) -> dict:
        """The content of config.json."""
        return self.extra | {key: value for key, value in vars(self).items() if key != "extra"}


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, computed in float32 (Zhang and Sennrich, 2019)."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_embedding(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, D) of positions (B, T), in float32, because bf16 rounds large positions
    to the same angle (RoPE; Su et al., 2021). Llama 3 divides the frequencies with fewer than
    `low_freq_factor` turns in the original context by `factor`, keeps those with more than
    `high_freq_factor`, and interpolates in between."""
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)             # (D/2,)
    if llama3 := config.rope_scaling:
        low, high = llama3["low_freq_factor"], llama3["high_freq_factor"]
        turns = frequencies * llama3["original_max_position_embeddings"] / (2 * torch.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / llama3["factor"])
    angles = positions[:, None, :, None].float() * frequencies.repeat(2)     # (B, 1, T, D)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, T, D) with each pair (x[i], x[i + D/2]) rotated by its angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention within each document of a packed row: q (1, H, T, D), k, v (1, K, T, D)."""
    # One call per document: the cost is the sum of the squared lengths, not the square of the sum.
    documents = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
                      for qkv in documents], dim=2)


class Attention(nn.Module):
    """Causal attention with H query heads that share K key-value heads (Ainslie et al., 2023)."""

    def __init__(self, config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        qkv_bias, qk_norm = config.model_type == "qwen2", config.model_type == "qwen3"
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=qkv_bias)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=qkv_bias)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if qk_norm else nn.Identity()

    def forward(self, x, rope, lengths, cache):
        B, T, _ = x.shape
        q, k, v = (projection(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H or K, T, D)
                   for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary(self.q_norm(q), *rope), apply_rotary(self.k_norm(k), *rope)
        if cache is None:
            y = packed_attention(q, k, v, lengths)                              # (B, H, T, D)
        else:
            (keys, values), positions, mask = cache             # (B, K, L, D), (B, T), (B, 1, T, L)
            rows = torch.arange(B, device=x.device)[:, None]
            keys[rows, :, positions] = k.transpose(1, 2).to(keys.dtype)
            values[rows, :, positions] = v.transpose(1, 2).to(values.dtype)
            keys, values = keys[:, :, :mask.shape[-1]], values[:, :, :mask.shape[-1]]
            if T == 1:      # H/K queries per key head: enable_gqa copies keys and values H/K times
                q = q.reshape(B, keys.shape[1], -1, self.head_dim)              # (B, K, H/K, D)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=T > 1)
            y = y.reshape(B, -1, T, self.head_dim)                              # (B, H, T, D)
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
    """Attention, then MLP, each after a norm and added to its input."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rope, lengths=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, lengths, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass
class KVCache:
    """Keys and values of S slots, one sequence each. The next T tokens of slot s get the positions
    lengths[s], lengths[s] + 1, ...; lengths[s] = 0 frees a slot, nothing needs to be erased."""
    layers: list[tuple[Tensor, Tensor]]             # (k, v), each (S, K, L, D)
    lengths: Tensor                                 # (S,), on the CPU: tokens in each slot

    @classmethod
    def allocate(cls, config, max_num_seqs, max_seq_len, dtype=torch.float32, device="cpu"):
        """An empty cache. A token takes 2 * layers * K * D numbers: 256 KiB in bf16 for s1-32B."""
        shape = (max_num_seqs, config.num_key_value_heads, max_seq_len, config.head_dim)
        layers = [tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")
                  for _ in range(config.num_hidden_layers)]
        return cls(layers, torch.zeros(max_num_seqs, dtype=torch.long))

    def slots(self, start: int, end: int) -> "KVCache":
        """The slots from `start` to `end`, as a view."""
        return KVCache([(k[start:end], v[start:end]) for k, v in self.layers],
                       self.lengths[start:end])

    def copy(self, other: "KVCache", slot: int):
        """Copy the sequence in the only slot of `other` to `slot`."""
        n = self.lengths[slot] = other.lengths[0]
        for (k, v), (other_k, other_v) in zip(self.layers, other.layers, strict=True):
            k[slot, :, :n], v[slot, :, :n] = other_k[0, :, :n], other_v[0, :, :n]

    def reserve(self, T: int) -> tuple[Tensor, Tensor]:
        """The next T positions (B, T) and their mask (B, 1, T, L). Adds T to `lengths`."""
        k, end = self.layers[0][0], int(self.lengths.max()) + T
        if end > k.shape[2]:
            raise ValueError(f"the KV cache has {k.shape[2]} positions, {end} are needed")
        positions = (self.lengths[:, None] + torch.arange(T)).to(k.device)
        self.lengths += T
        return positions, torch.arange(end, device=k.device) <= positions[:, None, :, None]


def softmax_step(logits: Tensor, labels: Tensor, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of logits (n, V), and p[label] - 1, (n, 1). The logits become their
    gradient, p minus one-hot, where p is the softmax in float32. `scratch` (n, V) holds p; a
    compiled kernel does not need it."""
    top, index = logits.amax(1).float(), labels[:, None]
    picked = logits.gather(1, index)[:, 0].float()
    p = logits.float() if scratch is None else scratch.copy_(logits)
    p = torch.softmax(p, 1, out=scratch)
    # log Z = max - log p_max, because p_max = exp(max) / Z; p_max is at least 1/V.
    loss = (top - p.amax(1).log() - picked).sum()
    label_grad = p.gather(1, index) - 1
    # scatter_ copies on a CPU: index assignment, here and below, makes the loss 1.4 times as fast.
    logits.copy_(p)[torch.arange(len(labels), device=labels.device), labels] = (
        label_grad[:, 0].to(logits.dtype))
    return loss, label_grad


class FusedLinearCrossEntropy(torch.autograd.Function):
    """The sum over rows of -log softmax(hidden @ weight.T)[label], and its gradients in one pass.

    hidden (N, C), weight (V, C), labels (N,), all supervised. All logits at once would be 5 GB in
    bf16 for 16,384 tokens of Qwen, so for each chunk of n rows:

        logits = hidden[chunk] @ weight.T           (n, V)
        p = softmax(logits)                         in float32
        loss += -log p[label]                       a sum: the caller divides by the step's tokens
        p[label] -= 1                               d loss / d logits
        grad_hidden[chunk] = p @ weight
        grad_weight += p.T @ hidden[chunk]          in float32
    """
    compiled = False                    # whether `softmax_step` is one compiled kernel

    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk_bytes=None):
        (N, C), V, on_cpu = hidden.shape, weight.shape[0], hidden.device.type == "cpu"
        chunk_bytes = chunk_bytes or (2**25 if on_cpu else 2**30)
        chunk_size = max(1, min(N, chunk_bytes // (4 * V)))     # 4: the softmax is float32
        vocab_chunk = min(V, 4096 if on_cpu else 16384)         # a slice fits into a CPU's cache
        w = weight.to(hidden.dtype)     # under autocast the weight is float32, hidden is bf16
        loss, grad_hidden = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        # Buffers are reused, because fresh memory costs more than the arithmetic.
        all_logits, product = hidden.new_empty(chunk_size, V), hidden.new_empty(vocab_chunk, C)
        kernel, scratch = softmax_step, all_logits.new_empty(chunk_size, V, dtype=torch.float32)
        if FusedLinearCrossEntropy.compiled:
            kernel, scratch = torch.compile(softmax_step, dynamic=True), None
        for start in range(0, N, chunk_size):
            h, y = hidden[start:][:chunk_size], labels[start:][:chunk_size]  # (n, C), (n,)
            logits = torch.mm(h, w.T, out=all_logits[:len(h)])               # (n, V)
            chunk_loss, y_grad = kernel(logits, y, scratch if scratch is None else scratch[:len(h)])
            loss += chunk_loss
            torch.mm(logits, w, out=grad_hidden[start:start + chunk_size])
            # The bf16 product would round what the label's rows contribute, which dominates a
            # word's gradient. It is added separately, in float32.
            logits[torch.arange(len(y), device=y.device), y] = 0
            for v in range(0, V, vocab_chunk):
                p = logits[:, v:v + vocab_chunk]
                grad_weight[v:v + vocab_chunk] += torch.mm(p.T, h, out=product[:p.shape[1]])
            grad_weight.index_add_(0, y, y_grad * h)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        # A 0-dim float32 factor keeps the dtype of grad_hidden and is not rounded to it itself.
        # In place, because a second float32 tensor of the weight's size may not fit.
        return grad_hidden * grad_loss, grad_weight.mul_(grad_loss).to(ctx.weight_dtype), None, None


class Transformer(nn.Module):
    """A decoder of the Qwen2, Qwen3 or Llama family."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids, positions=None, lengths=None, labels=None, cache=None):
        """Logits (B, T, V), or with `labels` the summed loss and the number of supervised tokens.

        Packed rows (B = 1): `lengths` of the documents, `positions` that restart in each, `labels`
        already shifted, -100 for none; on the CPU they save a synchronization. Decoding: `cache`.
        """
        B, T = ids.shape
        if cache is not None:
            x = self.hidden_states(ids, *cache.reserve(T), cache.layers)     # (B, T, C)
        else:
            if positions is None:
                positions = torch.arange(T, device=ids.device).expand(B, T)
            x = self.hidden_states(ids, positions, lengths=lengths or [T])   # (B, T, C)
        if labels is None:
            return F.linear(x, self.output_weight)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        supervised = (labels.flatten() != -100).nonzero()[:, 0]              # (N,)
        hidden = x.flatten(0, 1)[supervised.to(x.device)]                    # (N, C)
        labels = labels.flatten()[supervised].to(x.device)                   # (N,)
        return FusedLinearCrossEntropy.apply(hidden, self.output_weight, labels), len(supervised)

    def hidden_states(self, ids, positions, mask=None, layers=None, lengths=None) -> Tensor:
        """The input (B, T, C) of the output layer. `mask` and `layers` are those of a KVCache."""
        rope = rotary_embedding(positions, self.config)
        x = self.model.embed_tokens(ids)                                     # (B, T, C)
        for i, block in enumerate(self.model.layers):
            cache = (layers[i], positions, mask) if layers else None
            if self.gradient_checkpointing:         # keep only x, run the block again in backward
                x = checkpoint(block, x, rope, lengths, cache, use_reentrant=False)
            else:
                x = block(x, rope, lengths, cache)
        return self.model.norm(x)

    @property
    def output_weight(self) -> Tensor:
        """The weight (V, C) of the output layer, which a tied model shares with its embedding."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def compile_kernels(self):
        """Compile loss, MLPs and norms; attention would recompile for each new document length."""
        FusedLinearCrossEntropy.compiled = True
        for block in self.model.layers:
            for module in (block.mlp, block.input_layernorm, block.post_attention_layernorm):
                module.compile(dynamic=True)

    def init_weights(self, seed: int) -> "Transformer":
        """Set random normal weights, scaled down in front of each residual sum (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * self.config.num_hidden_layers) ** -0.5 if residual else 1.0
                nn.init.normal_(p, std=self.config.initializer_range * scale, generator=generator)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        return self

    @classmethod
    def load(cls, directory, dtype=torch.float32, device="cpu", prepare=None) -> "Transformer":
        """The model of a Hugging Face directory. `prepare(model)` may shard it before it has
        memory; a rank then reads its shard. Raises ValueError if it is broken or unsupported."""
        config, stored = read_config(directory), read_tensors(Path(directory))
        names = ("lm_head.weight", "model.embed_tokens.weight")
        if config.tie_word_embeddings and stored.keys() >= set(names):
            # Some configs say tied although the checkpoint has a separate head: keep it.
            config.tie_word_embeddings = torch.equal(*(stored[name].to(dtype) for name in names))
        if config.tie_word_embeddings:
            stored.pop("lm_head.weight", None)
        with torch.device("meta"):
            model = cls(config).to(dtype)
        try:
            model.load_state_dict({name: t.to("meta") for name, t in stored.items()})
        except RuntimeError as error:       # lists missing, unexpected and mis-shaped tensors
            raise ValueError(f"{directory}: {' '.join(str(error).split())}") from None
        if prepare:
            prepare(model)
        for name, p in model.to_empty(device=device).state_dict().items():
            source = stored[name]
            if isinstance(p, DTensor):              # only read the rows of this rank
                mesh, p = p.device_mesh, p.to_local()
                rows_per_rank = -(-len(source) // mesh.size())      # rounded up, as in torch.chunk
                source = source[mesh.get_local_rank() * rows_per_rank:][:len(p)]
            p.copy_(source)
        return model

    def save(self, directory, dtype=None, shard_bytes=5e9):
        """Write config.json and safetensors files of at most `shard_bytes`. All ranks of a sharded
        model call this and gather one file at a time; those with `directory` None write nothing."""
        dtype, state = dtype or self.output_weight.dtype, self.state_dict()
        sizes = {key: torch.empty(p.shape, dtype=dtype, device="meta") for key, p in state.items()}
        files = split_torch_state_dict_into_shards(sizes, max_shard_size=int(shard_bytes))
        if directory is not None:
            directory = Path(directory)
            directory.mkdir(parents=True, exist_ok=True)
            whole, index = (directory / f"model.safetensors{end}" for end in ("", ".index.json"))
            for old in (whole, index, *directory.glob("model-*-of-*.safetensors")):
                old.unlink(missing_ok=True)
            if files.is_sharded:
                value = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
                index.write_text(json.dumps(value, indent=2) + "\n")
            name = str(dtype).removeprefix("torch.")
            value = {**self.config.to_dict(), "dtype": name, "torch_dtype": name}   # new, old key
            (directory / "config.json").write_text(json.dumps(value, indent=2) + "\n")
        device = "meta" if directory is None else "cpu"         # only keep what is written
        for file, names in files.filename_to_tensors.items():
            tensors = {}                                        # of one file
            for name in names:
                p = state[name].to(dtype)
                tensors[name] = (p.full_tensor() if isinstance(p, DTensor) else p).to(device)
            if directory is not None:
                safetensors.torch.save_file(tensors, directory / file, metadata={"format": "pt"})


def read_config(directory) -> Config:
    """The Config of a Hugging Face directory. Raises ValueError if it is broken or unsupported."""
    path = Path(directory) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}      # new and old key
        said = raw | {"rope_type": rope.get("rope_type", rope.get("type", "default")),
                      "sliding_attention": "sliding_attention" in str(raw.get("layer_types"))}
        for key, supported in SUPPORTED.items():
            if said.get(key) not in supported:
                raise ValueError(f"{key} {said.get(key)!r} is not supported")
        known = {f.name: raw.get(f.name, f.default) for f in fields(Config) if f.name != "extra"}
        known["rope_theta"] = rope.get("rope_theta", known["rope_theta"])
        known["rope_scaling"] = rope if said["rope_type"] == "llama3" else None
        return Config(**known, extra={key: raw[key] for key in raw if key not in known})
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from None


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory, memory-mapped: data is read when it is copied."""
    tensors, path = {}, directory / "model.safetensors"
    try:
        names = [path.name]
        if not path.is_file():
            path = directory / "model.safetensors.index.json"
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        for name in sorted(set(names)):
            if Path(name).name != name:                                 # may lead outside
                raise ValueError(f"{name!r} is not a plain file name")
            path = directory / name
            if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-"):
                raise ValueError("it is a Git LFS pointer, run `git lfs pull`")
            tensors |= safetensors.torch.load_file(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
            safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
    quantised = [name for name, t in tensors.items() if not t.is_floating_point() or t.itemsize < 2]
    if quantised:
        raise ValueError(f"{directory} has quantised weights: {', '.join(sorted(quantised))}")
    return {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
