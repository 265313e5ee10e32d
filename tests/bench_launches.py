"""How many kernels are launched, counted on a CPU: a micro-batch of distillation, a decoded token.

    python tests/bench_launches.py                      # 36 layers, as of 4b; 4 bits, adapters
    python tests/bench_launches.py --layers 4 --bits 32

A network with the depth of Qwen3-VL-4B and small widths runs on a pretended CUDA device
(tests/pretend_cuda.py), where every operation that is neither a view nor an allocation counts as
one launch; small widths launch as often as large ones. On CUDA `torch.nn.functional.rms_norm` is
one kernel forward and one backward; on a CPU it decomposes, so it is taken as one by name here.
What bitsandbytes launches for a linear in 4 bits counts as it names it. Prints the counts with the
normalisation written out, as transformers has it, and as one kernel, as common.py has it.
"""
import argparse
import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch
from conftest import make_rows
from pretend_cuda import COUNTS, Pretended, held_of, pretended
from transformers import AutoConfig, AutoModelForImageTextToText

import common
import distill

VISION_LAYERS, DEEPSTACK = 24, [5, 11, 17]  # of Qwen3-VL-4B
ROWS, TOKENS = 2, 8                         # any: the number of launches does not depend on them


class OneKernel(torch.autograd.Function):
    """rms_norm as one launch forward and one backward."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        COUNTS["rms_norm"] += 1
        ctx.x, ctx.weight, ctx.rest = held_of(x).detach(), held_of(weight).detach(), (shape, eps)
        out = torch.nn.functional.rms_norm(ctx.x, shape, ctx.weight, eps)
        return Pretended(out) if type(x) is Pretended else out     # `load` computes on the CPU

    @staticmethod
    def backward(ctx, gradient):
        COUNTS["rms_norm backward"] += 1
        shape, eps = ctx.rest
        with torch.enable_grad():
            x = ctx.x.clone().requires_grad_()
            out = torch.nn.functional.rms_norm(x, shape, ctx.weight, eps)
        into, = torch.autograd.grad(out, x, held_of(gradient))
        return Pretended(into), None, None, None


def deep_checkpoint(folder, layers):
    """The bundled backbone with random weights and more layers."""
    shutil.copytree(common.TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.py"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = layers
    config["vision_config"] |= {"depth": VISION_LAYERS, "deepstack_visual_indexes": DEEPSTACK}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(
        folder)


def count_launches(folder, bits):
    """(launches of a micro-batch of distillation, of a decoded token)."""
    rows, images = make_rows(ROWS)
    with pretended():
        model, processor = common.load(str(folder), bits)
        model = common.add_lora(model, 8)
        pictures = common.encode(processor, [row.student_prompt() for row in rows], images, "cuda")
        symbols = common.encode(
            processor, [row.teacher_prompt("symbols+plan") for row in rows], None, "cuda")
        ids = torch.zeros(ROWS, TOKENS, dtype=torch.long, device="cuda")
        mask = torch.ones_like(ids)
        ones = torch.ones(ROWS * TOKENS, device="cuda")

        model.train()
        COUNTS.clear()
        with torch.no_grad(), common.without_adapters(model) as teacher:
            taught = common.response_hidden(teacher, symbols, ids, mask)
        hidden = common.response_hidden(model, pictures, ids, mask)
        gradient, _ = distill.chunked_divergence(
            hidden, taught, ids.flatten(), ones, ones, common.head(model), common.head(model),
            distill.reverse_kl, len(ones))
        hidden.backward(gradient)
        micro_batch = launches()

        model.eval()
        with torch.no_grad(), common.light_adapters(model):
            decoder = common.GraphDecoder(common.network(model), pictures, TOKENS)
            token = decoder.logits.argmax(-1)
            decoder.step(token)
            COUNTS.clear()
            decoder.step(token)
            return micro_batch, launches()


def launches():
    return sum(count for name, count in COUNTS.items() if not name.startswith("wait"))


def main(args):
    print(f"{args.layers} layers, {args.bits} bits, adapters on the language model; gradient "
          "checkpointing, one chunk of positions\n")
    print("| normalisation | launches of a micro-batch | of a decoded token |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder, "deep")
        deep_checkpoint(folder, args.layers)
        with mock.patch.object(common, "NORMS", ()):
            print("| written out | {:,} | {:,} |".format(*count_launches(folder, args.bits)))
        with mock.patch.object(common, "rms_norm", OneKernel.apply):
            print("| one kernel | {:,} | {:,} |".format(*count_launches(folder, args.bits)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16, 32))
    main(parser.parse_args())
