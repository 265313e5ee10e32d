"""Make the bundled backbone: a small Qwen3-VL that plays the part of a pretrained VLM.

    python tiny/build.py --check                # what the committed checkpoint can do
    python tiny/build.py --out tiny-new         # pretrain it from scratch, on the CPU; resumes
    python tiny/build.py --out tiny-new --init OLD      # only the last cycle, from OLD's weights

A step is 128 samples, drawn from (seed, step). From symbols: plans, plans with a reference plan in
the prompt, plans after a map with some cells wrong, maps and questions. From pictures: tiles and
lines described in words, and boards drawn in other art, asked for their map and for the questions,
never for a plan; the legend in the prompt says what is what, or it is the task's own, of which
nothing is there to see. A picture in the tasks' own art is never seen. Some plan prompts come
without symbols: the response states the map, and only what follows from it is learned; in some
with a picture, only the map. Boards come from the train split only.

How the committed weights were made, and what of them can be made again: docs/backbone.md. The
layers are compiled, which needs a C++ compiler; nothing else in this repository does.
"""
import random
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import gen_data
from gen_data import TASKS, Parser, fail, run_script, solve, whole_number  # noqa: E402

HERE = Path(__file__).parent
# The stages train on five of these; frozenlake 5 and minibehaviour 6 are only planned from symbols.
BOARDS = [("frozenlake", 3), ("frozenlake", 4), ("frozenlake", 5), ("maze", 3), ("maze", 4),
          ("minibehaviour", 5), ("minibehaviour", 6)]
MARKS = {"frozenlake": "SGHF", "maze": "SG.", "minibehaviour": "APT."}  # what a cell begins with

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]

# ---------------------------------------------------------------- pictures

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 230),
           "yellow": (240, 215, 40), "orange": (240, 140, 30), "purple": (150, 60, 180),
           "brown": (130, 85, 45), "white": (245, 245, 245), "grey": (130, 130, 130),
           "black": (15, 15, 15), "cyan": (90, 205, 235), "pink": (245, 150, 180)}
NAMES = list(COLOURS)
SHAPES = ("tile", "circle", "square", "triangle", "cross", "ring", "diamond", "bar", "dots", "arch")
SIDES = "nesw"
ASK_GRID = "The picture shows a pattern of tiles.\nWrite down the pattern, row by row."
ASK_LINES = ("The picture shows tiles with lines between them.\n"
             "Write down the colour and the lined sides of every tile, row by row.")
ASK_FIND = "The picture shows a pattern of tiles.\nWhich tiles hold this:"
SHOWS = "The picture shows the map. "
# Constant pieces of text that become one token each, beside the prompts.
SYMBOLS = ("The map in symbols:\nMap: ", "\nA reference plan: ",
           "\nDo not mention that a reference plan is given.", "user\n", "assistant\n", "\nMap: ")


def shade(rng, name, spread=25):
    return tuple(int(np.clip(v + rng.uniform(-spread, spread), 0, 255)) for v in COLOURS[name])


def draw_shape(draw, rng, kind, x, y, s, colour):
    """One shape inside the cell with corner (x, y) and side s px."""
    m = s * rng.uniform(0.08, 0.28)  # margin
    x, y = x + rng.uniform(-.06, .06) * s, y + rng.uniform(-.06, .06) * s
    a, b, c, d = x + m, y + m, x + s - m, y + s - m
    cx, cy, w = (a + c) / 2, (b + d) / 2, max(2, int(s * rng.uniform(.08, .16)))
    if kind == "circle":
        draw.ellipse([a, b, c, d], colour)
    elif kind == "square":
        draw.rectangle([a, b, c, d], colour)
    elif kind == "triangle":
        corners = [[(a, b), (c, cy), (a, d)], [(c, b), (a, cy), (c, d)],
                   [(a, d), (cx, b), (c, d)], [(a, b), (cx, d), (c, b)]]
        draw.polygon(corners[rng.randrange(4)], colour)
    elif kind == "cross":
        draw.line([a, b, c, d], colour, w)
        draw.line([a, d, c, b], colour, w)
    elif kind == "ring":
        draw.ellipse([a, b, c, d], outline=colour, width=w)
    elif kind == "diamond":
        draw.polygon([(cx, b), (c, cy), (cx, d), (a, cy)], colour)
    elif kind == "bar":
        upright = [cx - w, b, cx + w, d]
        draw.rectangle([a, cy - w, c, cy + w] if rng.random() < .5 else upright, colour)
    elif kind == "dots":
        for px, py in ((a, b), (c - 2 * w, b), (a, d - 2 * w), (c - 2 * w, d - 2 * w)):
            draw.ellipse([px, py, px + 2 * w, py + 2 * w], colour)
    elif kind == "arch":
        draw.pieslice([a, b, c, d + (d - b)], 180, 360, colour)


def draw_hairlines(draw, rng, rows, cols, cell):
    """A hairline grid that means nothing."""
    hair = shade(rng, rng.choice(NAMES))
    for i in range(rows + 1):
        draw.line([0, i * cell, cols * cell, i * cell], hair)
    for i in range(cols + 1):
        draw.line([i * cell, 0, i * cell, rows * cell], hair)


def add_noise(image, rng):
    """Sensor noise, in half of the pictures."""
    if rng.random() < .5:
        return image
    noise = np.random.default_rng(rng.getrandbits(32)).normal(
        0, rng.uniform(2, 12), (image.height, image.width, 1))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def generic_picture(rng, cell=32):
    """A grid of coloured tiles with shapes, or with lines between them: (image, prompt, answer)."""
    rows, cols = rng.randint(2, 5), rng.randint(2, 5)
    lined = rng.random() < 0.5
    image = Image.new("RGB", (cols * cell, rows * cell))
    draw = ImageDraw.Draw(image)
    ground = [rng.choice(NAMES) for _ in range(rng.randint(1, 3))]
    cells = [[None] * cols for _ in range(rows)]
    if lined:
        edge = {}
        for r in range(rows + 1):
            for c in range(cols + 1):
                edge[r, c, "n"], edge[r, c, "w"] = rng.random() < 0.5, rng.random() < 0.5
        for r in range(rows):  # the frame is mostly closed
            edge[r, 0, "w"], edge[r, cols, "w"] = rng.random() < .8, rng.random() < .8
        for c in range(cols):
            edge[0, c, "n"], edge[rows, c, "n"] = rng.random() < .8, rng.random() < .8
    for r in range(rows):
        for c in range(cols):
            x, y, colour = c * cell, r * cell, rng.choice(ground)
            draw.rectangle([x, y, x + cell - 1, y + cell - 1], shade(rng, colour))
            shape = rng.choice(SHAPES) if not lined or rng.random() < .25 else "tile"
            if shape != "tile":
                other = rng.choice([name for name in NAMES if name != colour])
                draw_shape(draw, rng, shape, x, y, cell, shade(rng, other))
                colour = other if not lined else colour
            if lined:
                on = [edge[r, c, "n"], edge[r, c + 1, "w"], edge[r + 1, c, "n"], edge[r, c, "w"]]
                sides = "".join(side for side, line in zip(SIDES, on, strict=True) if line)
                cells[r][c] = f"{colour} {sides or 'none'}"
            else:
                cells[r][c] = f"{colour} {shape}"
    if rng.random() < .6:
        draw_hairlines(draw, rng, rows, cols, cell)
    if lined:
        ink = shade(rng, rng.choice([name for name in NAMES if name not in ground]))
        w = rng.randint(3, 6)
        for (r, c, s), on in edge.items():
            x, y, thin = c * cell, r * cell, w // 2 - (w % 2 == 0)
            if on and s == "n" and c < cols:
                draw.rectangle([x, y - w // 2, x + cell - 1, y + thin], ink)
            if on and s == "w" and r < rows:
                draw.rectangle([x - w // 2, y, x + thin, y + cell - 1], ink)
    image = add_noise(image, rng)
    if lined:
        return image, ASK_LINES, gen_data.listing(cells)
    if rng.random() < .25:
        wanted = rng.choice(rng.choice(cells))
        if rng.random() > .8:
            wanted = f"{rng.choice(NAMES)} {rng.choice(SHAPES)}"
        return image, f"{ASK_FIND} {wanted}", gen_data.places(gen_data.find(cells, wanted))
    return image, ASK_GRID, gen_data.listing(cells)


def art_looks(rng, marks):
    """How each mark looks in one picture: {mark: (ground, shape, colour)}, all different."""
    looks = {}
    shared = rng.choice(NAMES) if rng.random() < .6 else None  # one ground under everything
    for mark in marks:
        seen = [look[1:] for look in looks.values()]
        while mark not in looks or looks[mark][1:] in seen:
            ground, shape = shared or rng.choice(NAMES), rng.choice(SHAPES)
            colour = ground
            if shape != "tile":
                colour = rng.choice([name for name in NAMES if name != ground])
            looks[mark] = ground, shape, colour
    return looks


def say_look(mark, look):
    ground, shape, colour = look
    if shape == "tile":
        return f"{mark} is plain {ground}"
    return f"{mark} is {colour} {shape} on {ground}"


def sprite(rng, cell):
    """A tile of random pixel art, mirrored, which no word describes."""
    palette = [shade(rng, rng.choice(NAMES), 40) for _ in range(rng.choice((2, 3, 3)))]
    if rng.random() < .4:  # a texture: one colour and close ones
        base = palette[0]
        for i in (1, 2):
            palette[i:] = [tuple(int(np.clip(v + rng.uniform(-40, 40), 0, 255)) for v in base)]
    half = np.array([rng.choices(palette, k=4) for _ in range(8)], np.uint8)
    tile = Image.fromarray(np.concatenate([half, half[:, ::-1]], 1))
    return tile.resize((cell, cell), Image.NEAREST)


def art_picture(rng, row, named=True, cell=32):
    """A board in random art: (image, the text that stands beside it).

    named: the text says what the things are; else it is the task's own legend, of which nothing is
    there to see, and the marks may be pixel art: what they are has to be guessed.
    """
    grid, marks = row.puzzle.cells(), MARKS[row.task]
    walled = any(len(text) > 1 for text in grid[0])  # a cell says its open sides
    looks = art_looks(rng, marks)
    if walled:  # one floor, walls of one colour, two marks on it
        floor = rng.choice(NAMES)
        wall = rng.choice([name for name in NAMES if name != floor])
        for mark in marks[:2]:
            looks[mark] = floor, *looks[mark][1:]
            while looks[mark][1] == "tile" or looks[mark][2] in (floor, wall):
                looks[mark] = floor, rng.choice(SHAPES), rng.choice(NAMES)
        looks["."] = floor, "tile", floor
    sprites = {}
    if not named and not walled and rng.random() < .6:
        sprites = {mark: sprite(rng, cell) for mark in marks if rng.random() < .8}
    side = len(grid) * cell
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    for r, line in enumerate(grid):
        for c, text in enumerate(line):
            ground, shape, colour = looks[text[0]]
            x, y = c * cell, r * cell
            if text[0] in sprites:
                image.paste(sprites[text[0]], (x, y))
                continue
            draw.rectangle([x, y, x + cell - 1, y + cell - 1], shade(rng, ground))
            if shape != "tile":
                draw_shape(draw, rng, shape, x, y, cell, shade(rng, colour))
    if rng.random() < .5:
        draw_hairlines(draw, rng, len(grid), len(grid), cell)
    legend = "; ".join(say_look(mark, look) for mark, look in looks.items())
    if walled:
        legend += f"; wall is {wall}"
        ink, w = shade(rng, wall), rng.randint(2, 6)
        for r, line in enumerate(grid):
            for c, text in enumerate(line):
                x, y, end = c * cell, r * cell, cell - 1
                walls = {"U": [x, y, x + end, y + w // 2],
                         "D": [x, y + end - w // 2, x + end, y + end],
                         "L": [x, y, x + w // 2, y + end],
                         "R": [x + end - w // 2, y, x + end, y + end]}
                for action in walls.keys() - set(text[1:]):
                    draw.rectangle(walls[action], ink)
    return add_noise(image, rng), f"{SHOWS}{legend}." if named else row.picture_and_legend()


# ---------------------------------------------------------------- tokenizer, processor, config

def build_tokenizer(seed=0):
    """A byte-level BPE: every cell, action, position and constant phrase is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    rng = random.Random(seed)
    corpus = []
    phrases = {gen_data.ASK_FACTS, ASK_GRID, ASK_LINES, ASK_FIND, SHOWS, *SYMBOLS}
    for task, level in BOARDS:
        for row in board_pool(task, level, 200, seed):
            corpus += [row.teacher_prompt("symbols+plan"), row.response(), row.answers(),
                       art_picture(rng, row)[1]]
        phrases |= {row.puzzle.rules, *[question for question, _ in row.questions().values()],
                    row.picture_and_legend(), row.ask_plan()}
    corpus.append(" ".join(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))
    corpus += [generic_picture(rng)[2] for _ in range(2000)]
    for phrase in sorted(phrases):  # a set has another order in every process
        corpus = [text.replace(phrase, "") for text in corpus]
    pieces = (r"\nrow \d+:|\nRoute: from|Map: |\.\n<answer>|</?answer>| ?\(\d+,\d+\)"
              r"| [.SG](?=[UDLR])|,(?:PICK|DROP|[UDLR])|[UDLR]+(?=[\s,<]|$)"
              r"| (?:PICK|DROP) at| [UDLR] to|\n\d\. | ?\w+| ?[^\s\w]+|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pieces), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=1400, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(phrase, special=False, normalized=False)
                          for phrase in sorted(phrases)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        padding_side="left", model_max_length=4096)


def build_checkpoint(folder):
    """Write a checkpoint of random weights into `folder` -> (model, processor).

    Its tokenizer is new; shapes, processor and chat template are those of the files beside this
    script.
    """
    from transformers import (
        AutoProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
    )
    here, config = AutoProcessor.from_pretrained(HERE), Qwen3VLConfig.from_pretrained(HERE)
    tokenizer = build_tokenizer()
    processor = Qwen3VLProcessor(here.image_processor, tokenizer, here.video_processor,
                                 chat_template=here.chat_template)
    text, ids = config.text_config, {}
    for token in SPECIAL:
        ids[token] = tokenizer.convert_tokens_to_ids(token)
    text.vocab_size = len(tokenizer)
    text.pad_token_id, text.eos_token_id = ids["<|endoftext|>"], ids["<|im_end|>"]
    config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
    config.vision_start_token_id = ids["<|vision_start|>"]
    config.vision_end_token_id = ids["<|vision_end|>"]
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.pad_token_id = text.pad_token_id
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return model, processor


# ---------------------------------------------------------------- the mixture

def board_pool(task, level, count, seed):
    """Rows of the train split; repeated ones are kept, this is a stream and not a data set."""
    rng, rows = np.random.default_rng([seed, level, len(task)]), []
    while len(rows) < count:
        puzzle = TASKS[task].sample(rng, level)
        plan = solve(puzzle) if gen_data.split_of(task, puzzle) == "train" else None
        if plan:
            rows.append(gen_data.PuzzleRow({"id": "", "task": task, "level": level,
                                            "state": asdict(puzzle), "plan": plan}))
    return rows


def random_plan(rng, puzzle):
    """A shortest plan at random: at every position any action that comes one step closer."""
    start = puzzle.start_pos()
    # Per distance: position -> the (previous position, action) pairs that lead there.
    layers, seen = [{start: []}], {start}
    while not any(puzzle.done(pos) for pos in layers[-1]):
        layer = {}
        for pos in layers[-1]:
            for action in puzzle.actions:
                new, violation = puzzle.step(pos, action)
                if not violation and new not in seen:
                    layer.setdefault(new, []).append((pos, action))
        seen |= layer.keys()
        layers.append(layer)
    pos, plan = rng.choice([pos for pos in layers[-1] if puzzle.done(pos)]), []
    for layer in layers[:0:-1]:
        pos, action = rng.choice(layer[pos])
        plan.append(action)
    return plan[::-1]


# Each cycle is a cosine. kinds: shares of the mixture; boards: shares of BOARDS in it. The first
# learns everything, the second is about planning and about the larger boards.
CYCLES = [
    dict(steps=1300, lr=3e-3,
         kinds={"plan": .15, "given plan": .12, "no map": .05, "corrupted": .08, "perception": .15,
                "art": .17, "look": .08, "picture": .2},
         boards=[.1, .17, .1, .13, .25, .15, .1]),
    dict(steps=1200, lr=2e-3,
         kinds={"plan": .23, "given plan": .1, "no map": .03, "corrupted": .1, "perception": .12,
                "art": .25, "look": .12, "picture": .05},
         boards=[.06, .12, .17, .08, .27, .12, .18]),
]
STEPS = sum(cycle["steps"] for cycle in CYCLES)


def cycle_at(step):
    """The cycle a step belongs to and the learning rate there."""
    for cycle in CYCLES:
        if step < cycle["steps"]:
            cosine = max(.01, .5 + .5 * np.cos(np.pi * step / cycle["steps"]))
            return cycle, cycle["lr"] * min(1, (step + 1) / 100) * cosine
        step -= cycle["steps"]


def draw_sample(rng, pools, cycle):
    """One pretraining sample: (kind, prompt, image or None, [(text, supervised?), ...]).

    The EOS goes with the last text.
    """
    kind = rng.choices(list(cycle["kinds"]), cycle["kinds"].values())[0]
    if kind == "picture":
        image, prompt, answer = generic_picture(rng)
        return kind, prompt, image, [(answer, True)]
    board = rng.choices(BOARDS, cycle["boards"])[0]
    row = rng.choice(pools[board])
    if kind in ("perception", "art"):  # questions: the map alone, or one, some, or all of them
        image, reads = None, row.symbols()
        if kind == "art":
            image, reads = art_picture(rng, row, rng.random() < .6)
        names = tuple(row.questions())
        if rng.random() < .5:
            names = names[:1]
        else:
            names = tuple(rng.sample(names, rng.choice((1, 2, 3, len(names)))))
        return kind, row.ask(names, reads), image, [(row.answers(names), True)]
    if kind == "no map":  # the response states the map; its form and what follows are learned
        map_text, rest = row.response().split("\nRoute", 1)
        prompt, image = row.student_prompt(), None
        if rng.random() < .5:  # beside a picture of another board: the map is never read off it
            image, legend = art_picture(rng, rng.choice(pools[board]), rng.random() < .6)
            prompt = prompt.replace(row.picture_and_legend(), legend)
        heads = re.split(r"(\nrow \d+:)", map_text)
        pieces = [(text, i % 2 == 1) for i, text in enumerate(heads)]
        pieces[0] = pieces[0][0], image is not None  # the size
        return kind, prompt, image, [*pieces, ("\nRoute" + rest, True)]
    if kind == "look":  # asked for a plan of a picture: its map is learned, nothing that follows
        image, legend = art_picture(rng, row, rng.random() < .6)
        map_text, rest = row.response().split("\nRoute", 1)
        prompt = row.student_prompt().replace(row.picture_and_legend(), legend)
        return kind, prompt, image, [(map_text, True), ("\nRoute" + rest, False)]
    with_plan = kind == "given plan" or (kind == "corrupted" and rng.random() < .5)
    if with_plan and rng.random() < .4:
        row = gen_data.PuzzleRow({**row.data, "plan": random_plan(rng, row.puzzle)})
    prompt = row.teacher_prompt("symbols+plan" if with_plan else "symbols")
    text = row.response()
    if kind != "corrupted":
        return kind, prompt, None, [(text, True)]
    # Corrupted: some cells of the stated map are wrong; the true plan follows all the same.
    map_text, rest = text.split("\nRoute", 1)
    words, share = re.split(r"( )", map_text), rng.choice((.1, .3, .6))
    other = rng.choice(pools[board]).response().split("\nRoute")[0]
    pieces = []
    for mine, wrong in zip(words, re.split(r"( )", other), strict=True):  # same level, same words
        cell = mine.strip() and not any(part in mine for part in ("row", "Map", "x", "\n"))
        swap = bool(cell) and rng.random() < share
        pieces.append((wrong if swap else mine, not (swap and wrong != mine)))
    return kind, prompt, None, pieces + [("\nRoute" + rest, True)]


def collate(processor, samples):
    """Samples -> (prompt batch, response ids [B, T], mask [B, T], supervised [B, T])."""
    prompt = common.encode(processor, [s[1] for s in samples], [s[2] for s in samples])
    texts = ["".join(text for text, _ in s[3]) for s in samples]
    ids, mask = common.encode_responses(processor, texts)
    offsets = processor.tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    supervised = mask.clone()
    for i, (_, _, _, pieces) in enumerate(samples):
        learned = np.concatenate([np.full(len(text), flag) for text, flag in pieces])
        for j, (begin, end) in enumerate(offsets[i]):
            supervised[i, j] = int(learned[begin:end].all())
        supervised[i, len(offsets[i])] = int(pieces[-1][1])  # the end token
    return prompt, ids, mask, supervised


# ---------------------------------------------------------------- pretraining

def start_from(model, processor, folder):
    """Take another checkpoint's weights; a token that both know keeps its embedding."""
    old, old_processor = common.load(folder, 32)
    weights, index = old.state_dict(), old_processor.tokenizer.get_vocab()
    name = "model.language_model.embed_tokens.weight"
    with torch.no_grad():
        for token, i in processor.tokenizer.get_vocab().items():
            if token in index:
                model.state_dict()[name][i] = weights[name][index[token]]
    model.load_state_dict({key: weight for key, weight in weights.items()
                           if key not in (name, "lm_head.weight")}, strict=False)


def pretrain(args):
    work = Path(args.out)
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()) and not (work / "pretrain.pt").is_file():
        fail(f"{work} is not empty and holds no pretraining to resume: choose another --out")
    model, processor = build_checkpoint(work)
    step = 0
    if args.init:
        start_from(model, processor, args.init)
        step = CYCLES[0]["steps"]
    model.set_attn_implementation("eager")
    model.requires_grad_(True).train()
    # Compiled layers under bfloat16 autocast: 2.5 times the tokens a second of plain float32.
    layers = model.model.language_model.layers
    plain = [layer.forward for layer in layers]
    fast = [torch.compile(layer.forward, dynamic=True) for layer in layers]
    weights = dict(model.named_parameters())
    matrices = {name: p for name, p in weights.items() if p.ndim == 2 and "embed" not in name}
    others = [p for name, p in weights.items() if name not in matrices]
    optimizers = [
        torch.optim.Muon(list(matrices.values()), lr=CYCLES[0]["lr"], weight_decay=.05,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=CYCLES[0]["lr"], betas=(.9, .98), weight_decay=.0)]
    state_file = work / "pretrain.pt"
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step = saved["step"]
        print(f"resuming at step {step}")
    pools = {board: board_pool(*board, 12_000, seed=1) for board in BOARDS}
    begin, stats = time.time(), {}
    while step < STEPS:
        rng = random.Random(f"{args.seed}:{step}")
        cycle, lr = cycle_at(step)
        samples = [draw_sample(rng, pools, cycle) for _ in range(args.batch)]
        # Micro-batches of similar length, pictures apart from text: little padding.
        samples.sort(key=lambda s: (
            s[2] is not None,
            len(processor.tokenizer(s[1])["input_ids"]) + sum(len(t) for t, _ in s[3]) // 3))
        cut = sum(s[2] is None for s in samples)
        thirds = (0, cut // 3, 2 * cut // 3, cut, len(samples))
        micro = [samples[a:b] for a, b in zip(thirds, thirds[1:], strict=False) if a < b]
        batches = [(some, collate(processor, some)) for some in micro]
        total = sum(int(batch[3].sum()) for _, batch in batches)
        for layer, forward in zip(layers, fast, strict=True):
            layer.forward = forward
        for some, (prompt, ids, mask, supervised) in batches:
            learned = supervised.bool()
            with torch.autocast("cpu", torch.bfloat16):
                hidden = common.response_hidden(model, prompt, ids, mask)[learned[mask.bool()]]
                logits = model.lm_head(hidden).float()
            losses = torch.nn.functional.cross_entropy(logits, ids[learned], reduction="none")
            (losses.sum() / total).backward()
            row_of = learned.nonzero()[:, 0]
            for i, sample in enumerate(some):
                own = losses.detach()[row_of == i]
                stats.setdefault(sample[0], []).append(own.sum().item() / max(1, len(own)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 25 == 0:
            line = "  ".join(f"{kind} {np.mean(values):.3f}" for kind, values in stats.items())
            print(f"step {step} {time.time() - begin:.0f} s  {line}", flush=True)
            stats = {}
        if step % args.save_every == 0 or step == STEPS:
            torch.save({"model": model.state_dict(), "step": step,
                        "optimizers": [o.state_dict() for o in optimizers]},
                       state_file.with_suffix(".new"))
            state_file.with_suffix(".new").rename(state_file)
            for layer, forward in zip(layers, plain, strict=True):
                layer.forward = forward
            model.save_pretrained(work)
            print(table(report(model.eval(), processor, 40, "val")), flush=True)
            model.train()


# ---------------------------------------------------------------- what it can do

def greedy(model, processor, prompts, images=None):
    """Greedy answers, one per prompt."""
    batch = common.encode(processor, prompts, images)
    ids, mask, _ = common.sample(model, processor, batch, 140)
    return common.decode(processor, ids, mask)


def report(model, processor, count, split):
    """What greedy answers to `count` held-out boards of each of BOARDS are worth.

    Returns {(task, level): {name: share}}: success from symbols and from pictures; from pictures
    "parsed" (the answer holds a plan) and "map" (the map described is right); "asked": asked for
    the map, from symbols and from pictures, the answer is one map and ends there.
    """
    shares = {}
    for task, level in BOARDS:
        rows = list(gen_data.sample_rows(task, level, split, count, seed=7))
        images = [row.puzzle.render(32) for row in rows]
        from_text = greedy(model, processor, [row.teacher_prompt("symbols") for row in rows])
        from_image = greedy(model, processor, [row.student_prompt() for row in rows], images)
        prompts = [row.ask(("map",), row.symbols()) for row in rows]
        asked = greedy(model, processor, prompts)
        asked += greedy(model, processor, [row.ask(("map",)) for row in rows], images)
        text = [row.judge(answer) for row, answer in zip(rows, from_text, strict=True)]
        image = [row.judge(answer) for row, answer in zip(rows, from_image, strict=True)]
        shares[task, level] = {
            "symbols": np.mean([verdict["outcome"] == "success" for verdict in text]),
            "pictures": np.mean([verdict["outcome"] == "success" for verdict in image]),
            "parsed": np.mean([verdict["plan"] is not None for verdict in image]),
            "map": np.mean([verdict["map_right"] for verdict in image]),
            "asked": np.mean([text.startswith("Map:") and "Route" not in text for text in asked])}
    return shares


def table(shares):
    """The report in Markdown, in %."""
    columns = list(next(iter(shares.values())))
    lines = ["| task | size | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for (task, level), share in shares.items():
        numbers = " | ".join(f"{100 * share[name]:.1f}" for name in columns)
        lines.append(f"| {task} | {level} | {numbers} |")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--check", action="store_true", help="measure the committed checkpoint and stop")
    add("--out", default="tiny-new", help="folder of the new checkpoint and of its resume file")
    add("--init", metavar="OLD", help="checkpoint folder to start the last cycle from")
    add("--batch", type=whole_number(1), default=128, help="samples per step")
    add("--seed", type=whole_number(0), default=0)
    add("--save_every", type=whole_number(1), default=200, help="steps between saves")
    return parser.parse_args(argv)


def main(args):
    if not args.check:
        return pretrain(args)
    print("200 held-out boards each, greedy answers, in %. symbols, pictures: success; parsed, "
          "map: from pictures, an answer holds a plan, its map is right; asked: asked for the map, "
          "it ends after one.\n")
    print(table(report(*common.load(str(HERE), 32), 200, "test")))


if __name__ == "__main__":
    run_script(parse_args, main)
