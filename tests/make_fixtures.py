"""Make tests/fixtures: a tiny random model of each family and what transformers computes with it.

    pip install transformers==5.23.0 && python tests/make_fixtures.py [another folder]

Each directory is what `save_pretrained` writes (in bf16, fp16 or fp32; one file or shards), and

- golden.safetensors: ids (1, 40), logits (1, 40, V), `grad.NAME` of the summed next-token loss, and
  `greedy`, the 64 tokens that follow the first 8 ids; all computed in float32,
- golden.json: the token ids of the prompt of one question, with thinking and without.

The chat templates are not made here: chat_template.jinja of each directory is written by hand, as a
short form of the family's own, and kept.
"""
import json
import shutil
import sys
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QUESTION = "How many r are in\nstrawberry, and 12 + 30?"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# The class of the config, its keys, the dtype and shard size of the files, the control tokens
# (False: added, but not marked as special), the begin- and end-of-sequence tokens.
MODELS = {
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "rope_parameters": ROPE},
              torch.bfloat16, "5GB",
              {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True},
              None, "<|im_end|>"),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False, "head_dim": 16,
                              "rope_parameters": ROPE},
              torch.float32, "60KB",
              {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True,
               "<think>": False, "</think>": False},
              None, "<|im_end|>"),
    "llama": ("LlamaConfig", {"tie_word_embeddings": True, "max_position_embeddings": 256,
                              "rope_parameters": LLAMA3_ROPE},
              torch.float16, "5GB",
              {"<|begin_of_text|>": True, "<|start_header_id|>": True, "<|end_header_id|>": True,
               "<|eot_id|>": True, "<|end_of_text|>": True},
              "<|begin_of_text|>", "<|eot_id|>"),
    "r1": ("Qwen2Config", {"tie_word_embeddings": False},
           torch.bfloat16, "5GB",
           {"<｜begin▁of▁sentence｜>": True, "<｜end▁of▁sentence｜>": True, "<｜User｜>": False,
            "<｜Assistant｜>": False, "<think>": False, "</think>": False},
           "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
}


def make_tokenizer(directory, control, bos, eos, template):
    """Byte-level BPE with a few merges, followed by the family's control tokens."""
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
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=eos, chat_template=template,
        **({"bos_token": bos} if bos else {}))
    fast.save_pretrained(directory)
    if directory.name == "r1":          # like DeepSeek's own file, which has an object here
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config["bos_token"] = {"__type": "AddedToken", "content": bos}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return fast


def make_model(directory, tokenizer, kind, changes, dtype, shard):
    """Random weights; biases are not 0 and norms are not 1."""
    torch.manual_seed(sum(map(ord, directory.name)))
    config = getattr(transformers, kind)(
        vocab_size=len(tokenizer) + 3, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=None, **SIZES, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p) if p.dim() == 1 else 0
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)


def make_golden(directory, tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.randint(len(tokenizer), (1, 40))
    logits = model(ids).logits
    F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    greedy = model.generate(ids[:, :8], max_new_tokens=64, do_sample=False,
                            eos_token_id=-1, pad_token_id=0)
    save_file({"ids": ids, "logits": logits.detach(), "greedy": greedy[0, 8:].contiguous(),
               **{f"grad.{n}": p.grad for n, p in model.named_parameters()}},
              directory / "golden.safetensors")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True)
    prompt = prompt.removesuffix("<think>\n")           # R1's template already opens the thinking
    thinks = "<think>" in tokenizer.get_vocab()
    direct = prompt + ("<think>\n\n</think>\n\n" if thinks else "")
    (directory / "golden.json").write_text(json.dumps({
        "transformers": transformers.__version__, "question": QUESTION,
        "prompt": tokenizer(prompt, add_special_tokens=False).input_ids,
        "direct": tokenizer(direct, add_special_tokens=False).input_ids}) + "\n")


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES
    for name, (kind, changes, dtype, shard, control, bos, eos) in MODELS.items():
        template = (FIXTURES / name / "chat_template.jinja").read_text()
        directory = folder / name
        shutil.rmtree(directory, ignore_errors=True)
        tokenizer = make_tokenizer(directory, control, bos, eos, template)
        make_model(directory, tokenizer, kind, changes, dtype, shard)
        make_golden(directory, tokenizer)
        print(name, sum(path.stat().st_size for path in directory.iterdir()), "bytes")


if __name__ == "__main__":
    main()
