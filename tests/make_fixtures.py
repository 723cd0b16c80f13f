"""Make tests/fixtures: tiny random models of each family with what `transformers` computes of them.

    pip install transformers==5.23.0 jinja2 && python tests/make_fixtures.py

One directory a family, as `save_pretrained` writes it (bf16, fp16 and fp32; one file and shards),
and golden.safetensors: ids (1, 40), logits (1, 40, V), `grad.NAME` of the summed next-token loss,
and `greedy`, 64 tokens behind the first 8 ids; all of it in float32. golden.json has the token ids
of one conversation. The chat templates below are short ones of our own that write for one question
what the families' own templates write.
"""
import json
import shutil
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QUESTION = "How many r are in\nstrawberry, and 12 + 30?"
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.2)
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "<|im_start|>assistant{{ '\n' }}")

# name: config, its keys, dtype, bytes of a shard, control tokens (False: not special), eos,
# template
MODELS = {
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=True,
                                  rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
              torch.bfloat16, "5GB",
              {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True}, "<|im_end|>",
              "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n" + CHATML),
    "qwen3": ("Qwen3Config", dict(tie_word_embeddings=False, head_dim=16,
                                  rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
              torch.float32, "60KB",
              {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True,
               "<think>": False, "</think>": False}, "<|im_end|>",
              CHATML + "{% if not thinking %}<think>\n\n</think>\n\n{% endif %}"),
    "llama": ("LlamaConfig", dict(tie_word_embeddings=True, max_position_embeddings=256,
                                  rope_parameters={
                                      "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0,
                                      "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                      "original_max_position_embeddings": 32}),
              torch.float16, "5GB",
              {"<|begin_of_text|>": True, "<|start_header_id|>": True, "<|end_header_id|>": True,
               "<|eot_id|>": True, "<|end_of_text|>": True}, "<|eot_id|>",
              "<|begin_of_text|>{% for m in messages %}"
              "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
              "{% endfor %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}"),
    "r1": ("Qwen2Config", dict(tie_word_embeddings=False),
           torch.bfloat16, "5GB",
           {"<｜begin▁of▁sentence｜>": True, "<｜end▁of▁sentence｜>": True, "<｜User｜>": False,
            "<｜Assistant｜>": False, "<think>": False, "</think>": False}, "<｜end▁of▁sentence｜>",
           "<｜begin▁of▁sentence｜>"
           "{% for m in messages %}<｜User｜>{{ m.content }}<｜Assistant｜>{% endfor %}"
           "{% if not thinking %}<think>\n\n</think>\n\n{% endif %}"),
}


def make_tokenizer(directory, control, eos, template):
    """Byte-level BPE with a few merges, the family's control tokens behind it."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(
        [SYSTEM, QUESTION, "user\n", "think\nassistant\n\nWait"] * 3,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    made.add_tokens([tokenizers.AddedToken(name, special=special, normalized=False)
                     for name, special in control.items()])
    first = next(iter(control))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, made.token_to_id(first))])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos,
                                                chat_template=template)
    fast.save_pretrained(directory)
    return fast


def make(name, kind, changes, dtype, shard, control, eos, template):
    directory = FIXTURES / name
    shutil.rmtree(directory, ignore_errors=True)
    tokenizer = make_tokenizer(directory, control, eos, template)
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, kind)(
        vocab_size=len(tokenizer) + 3, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=None, **SIZES, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():                # norms and biases that are not 1 and 0
        p.data += 0.2 * torch.randn_like(p) if p.dim() == 1 else 0
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.randint(len(tokenizer), (1, 40))
    logits = model(ids).logits
    F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    greedy = model.generate(ids[:, :8], max_new_tokens=64, do_sample=False,
                            eos_token_id=-1, pad_token_id=0)
    save_file({"ids": ids, "logits": logits.detach(), "greedy": greedy[0, 8:].contiguous(),
               **{f"grad.{n}": p.grad for n, p in model.named_parameters()}},
              directory / "golden.safetensors")
    ask = [{"role": "user", "content": QUESTION}]
    (directory / "golden.json").write_text(json.dumps({
        "transformers": transformers.__version__, "question": QUESTION,
        **{key: tokenizer.apply_chat_template(ask, thinking=thinking, return_dict=False)
           for key, thinking in (("prompt", True), ("direct", False))}}) + "\n")


if __name__ == "__main__":
    for name, what in MODELS.items():
        make(name, *what)
        print(name, sum(path.stat().st_size for path in (FIXTURES / name).iterdir()), "bytes")
