"""Laws of the built-in task and its policy: every answer follows from the picture alone."""

import multiprocessing
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cppo.builtin import GRIDS, Puzzle, ShapesTask, WarmStart, ensure, label_tokens
from cppo.builtin import policy as policy_module
from cppo.builtin.policy import IMAGE_PIXELS, SPECIAL, build_model
from cppo.builtin.task import CELL_PIXELS, COLOURS, PLACES, SHAPES, render
from cppo.methods.cppo import PRESERVED
from cppo.policy import Policy, encode_item
from cppo.policy.families.qwen_vl import PatchProjection, QwenVL
from cppo.reward import default_reward

KINDS = ("next_to", "reverse", "columns", "bottom_up")
TINY = WarmStart(text_steps=2, text_batch=4, read_steps=2, read_batch=4, puzzles=8)
Cells = list[tuple[str, str]]


def named(text: str) -> list[tuple[str, str, str]]:
    """Places, colours and shapes, as a reading or an answer writes them."""
    words = text.split(" ")
    return list(zip(words[::3], words[1::3], words[2::3], strict=True))


def reading(puzzle: Puzzle) -> Cells:
    """The cells, in order, as the solution writes them down after looking."""
    written = re.match(r"<think> (.*?)\.</think>", puzzle.response)
    assert written is not None
    places, colours, shapes = zip(*named(written[1]), strict=True)
    assert places == PLACES[: len(places)]
    assert set(colours) <= set(COLOURS)
    assert set(shapes) <= set(SHAPES)
    return list(zip(colours, shapes, strict=True))


def answer_of(question: str, cells: Cells, columns: int) -> str:
    """What the question asks, worked out from the cells."""
    assert question.count("<image>") == 1
    asked = question.removesuffix("<image>")
    numbers = list(range(len(cells)))
    rows = [numbers[start : start + columns] for start in range(0, len(cells), columns)]
    beside = re.fullmatch(r"Which shape is (right of|below) the (\w+)\?", asked)
    if beside:
        start = PLACES.index(beside[2])
        there = start + (1 if beside[1] == "right of" else columns)
        assert there < len(cells)
        assert beside[1] == "below" or there % columns, "nothing lies right of the last column"
        wanted = [there]
    elif asked == "Name all shapes from the last to the first.":
        wanted = numbers[::-1]
    elif asked == "Name all shapes column by column.":
        wanted = [row[column] for column in range(columns) for row in rows]
    else:
        assert asked == "Name all shapes row by row, from the bottom up."
        wanted = [number for row in reversed(rows) for number in row]
    return " ".join(f"{PLACES[place]} {' '.join(cells[place])}" for place in wanted)


def task(
    difficulty: int = 1, *, split: str = "train", size: int = 400, seed: int = 0
) -> ShapesTask:
    return ShapesTask(split=split, size=size, difficulty=difficulty, seed=seed)


def puzzles_of(source: ShapesTask) -> list[Puzzle]:
    return [source.puzzle(index, draw=False) for index in range(len(source))]


# The task.


@pytest.mark.parametrize("difficulty", GRIDS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_answer_follows_from_what_the_solution_reads(difficulty: int, split: str) -> None:
    rows, columns = GRIDS[difficulty]
    for puzzle in puzzles_of(task(difficulty, split=split, size=300)):
        cells = reading(puzzle)
        assert len(cells) == rows * columns
        assert puzzle.item.answer == answer_of(puzzle.item.question, cells, columns)
        assert puzzle.response.endswith(f"</think> \\boxed{{{puzzle.item.answer}}}")


@pytest.mark.parametrize("difficulty", GRIDS)
def test_no_answer_only_repeats_the_reading(difficulty: int) -> None:
    for puzzle in puzzles_of(task(difficulty)):
        places = [place for place, _, _ in named(puzzle.item.answer)]
        assert places != list(PLACES[: len(reading(puzzle))])


@pytest.mark.parametrize("difficulty", GRIDS)
def test_every_solution_earns_the_whole_reward(difficulty: int) -> None:
    for puzzle in puzzles_of(task(difficulty, size=200)):
        item = puzzle.item
        reward = default_reward(puzzle.response, item.answer, item.question)
        assert (reward.total, reward.accuracy, reward.format) == (1.0, 1.0, 1.0)


def test_a_wrong_answer_earns_no_accuracy() -> None:
    for puzzle in puzzles_of(task(size=100)):
        wrong = puzzle.response.replace(f"boxed{{{puzzle.item.answer}}}", "boxed{pink star}")
        assert default_reward(wrong, puzzle.item.answer, puzzle.item.question).accuracy == 0.0


def test_kinds_of_question_take_turns() -> None:
    counted = Counter(puzzle.item.kind for puzzle in puzzles_of(task(size=400)))
    assert counted == dict.fromkeys(KINDS, 100)


@pytest.mark.parametrize("difficulty", GRIDS)
def test_a_guess_without_looking_is_hardly_ever_right(difficulty: int) -> None:
    written = puzzles_of(task(difficulty, size=800))
    for kind in KINDS:
        answers = Counter(p.item.answer for p in written if p.item.kind == kind)
        assert answers.most_common(1)[0][1] / answers.total() < 0.1


def test_a_puzzle_is_a_function_of_seed_split_difficulty_and_index_alone() -> None:
    first, again = task(size=50, seed=3), task(size=900, seed=3)
    for index in (49, 0, 7):  # in any order, from a source of any size
        one, other = first.puzzle(index), again.puzzle(index)
        assert one.solution == other.solution
        assert one.item.question == other.item.question
        assert one.item.images[0].tobytes() == other.item.images[0].tobytes()
    for changed in (task(seed=4), task(2, seed=3), task(split="eval", seed=3)):
        texts = [changed.puzzle(i, draw=False).response for i in range(20)]
        assert texts != [first.puzzle(i, draw=False).response for i in range(20)]


def test_a_puzzle_is_the_same_with_and_without_its_picture() -> None:
    source = task()
    for index in range(20):
        drawn, written = source.puzzle(index), source.puzzle(index, draw=False)
        assert (drawn.solution, drawn.item.answer) == (written.solution, written.item.answer)
        assert (len(drawn.item.images), len(written.item.images)) == (1, 0)
        assert source.read(index).question == drawn.item.question


@pytest.mark.parametrize("difficulty", GRIDS)
def test_a_careless_reader_is_asked_the_same_and_misreads_the_share_given(difficulty: int) -> None:
    source, misread, words = task(difficulty, size=300), 0, 0
    columns = GRIDS[difficulty][1]
    for index in range(len(source)):
        careful = source.puzzle(index, draw=False)
        careless = source.puzzle(index, draw=False, misread=0.15)
        assert careless.item == careful.item
        pairs = list(zip(reading(careful), reading(careless), strict=True))
        misread += sum(a != b for one, other in pairs for a, b in zip(one, other, strict=True))
        words += 2 * len(pairs)
        concluded = answer_of(careless.item.question, reading(careless), columns)
        assert careless.response.endswith(f"</think> \\boxed{{{concluded}}}")
    assert abs(misread / words - 0.15) < 4 * (0.15 * 0.85 / words) ** 0.5


@pytest.mark.parametrize("difficulty", GRIDS)
def test_train_and_eval_share_no_layout_whatever_their_seeds(difficulty: int) -> None:
    layouts = {
        split: {
            tuple(reading(puzzle))
            for seed in (0, 7)
            for puzzle in puzzles_of(task(difficulty, split=split, size=size, seed=seed))
        }
        for split, size in (("train", 1000), ("eval", 250))
    }
    assert min(map(len, layouts.values())) > 300
    assert layouts["train"] & layouts["eval"] == set()


@pytest.mark.parametrize("index", [-1, 400])
def test_a_puzzle_beyond_the_source_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match=str(index)):
        task(size=400).puzzle(index)


def test_a_split_or_difficulty_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="'test'"):
        task(split="test")
    with pytest.raises(ValueError, match="4"):
        task(4)


# The picture.


@pytest.mark.parametrize("difficulty", GRIDS)
def test_each_cell_of_the_picture_shows_the_colour_that_the_solution_reads(difficulty: int) -> None:
    rows, columns = GRIDS[difficulty]
    source = task(difficulty)
    for index in range(40):
        puzzle = source.puzzle(index)
        [picture] = puzzle.item.images
        assert picture.size == (columns * CELL_PIXELS, rows * CELL_PIXELS)
        pixels = np.asarray(picture, dtype=np.float64)
        for number, (colour, _) in enumerate(reading(puzzle)):
            row, column = divmod(number, columns)
            cell = pixels[row * 56 : row * 56 + 56, column * 56 : column * 56 + 56].reshape(-1, 3)
            shown = cell[cell.min(axis=1) < 190].mean(axis=0)  # the background is 225 or more
            distance = {name: np.abs(shown - rgb).max() for name, rgb in COLOURS.items()}
            assert min(distance, key=lambda name: distance[name]) == colour
            assert distance[colour] < 40  # tints differ by up to 18 levels, edges are mixed


def test_every_pair_of_shapes_and_of_colours_looks_different() -> None:
    def drawn(colour: str, shape: str) -> np.ndarray[Any, Any]:
        picture = render([(colour, shape)], 1, np.random.default_rng(5))
        return np.asarray(picture, dtype=np.float64)

    covered = {shape: drawn("blue", shape).min(axis=2) < 190 for shape in SHAPES}
    for first in SHAPES:
        assert 0.1 < covered[first].mean() < 0.5
        for second in SHAPES:
            union = (covered[first] | covered[second]).mean()
            overlap = (covered[first] & covered[second]).mean() / union
            assert (overlap == 1.0) == (first == second)
            assert overlap < 0.93 or first == second
    pictures = {colour: drawn(colour, "circle") for colour in COLOURS}
    for first in COLOURS:
        for second in COLOURS:
            difference = np.abs(pictures[first] - pictures[second]).mean()
            assert (difference == 0) == (first == second)


def test_two_pictures_of_one_layout_differ_in_size_and_place() -> None:
    cells = [("red", "circle")] * 4
    one, other = (render(cells, 2, np.random.default_rng(seed)) for seed in (1, 2))
    assert one.tobytes() != other.tobytes()


# Tokens and their labels.


@pytest.mark.parametrize("difficulty", GRIDS)
def test_perception_tokens_are_the_colours_and_shapes_of_the_reading_one_token_each(
    tokenizer: Any, difficulty: int
) -> None:
    for puzzle in puzzles_of(task(difficulty, size=100)):
        ids, labels = label_tokens(tokenizer, puzzle)
        assert len(ids) == len(labels)
        assert tokenizer.decode(ids) == puzzle.response
        marked = [tokenizer.decode([i]) for i, label in zip(ids, labels, strict=True) if label]
        assert marked == [f" {word}" for cell in reading(puzzle) for word in cell]


def test_every_colour_and_shape_is_one_token_after_a_space(tokenizer: Any) -> None:
    for word in (*COLOURS, *SHAPES):
        assert len(tokenizer(f" {word}").input_ids) == 1


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()  # lone surrogates are no text
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "Größe 图 🙂", "<think>x</think> \\boxed{1}"])
def test_these_texts_survive_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_one_token_each_and_all_different(tokenizer: Any) -> None:
    ids = [tokenizer(token).input_ids for token in SPECIAL.values()]
    assert all(len(found) == 1 for found in ids)
    assert len({found[0] for found in ids}) == len(SPECIAL)
    assert tokenizer.eos_token_id == tokenizer(SPECIAL["end"]).input_ids[0]


def test_the_chat_template_puts_the_picture_where_it_stands(tokenizer: Any) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_warm_start_asks_as_training_does(tiny_policy: Policy) -> None:
    for index in range(len(KINDS)):
        puzzle = task().puzzle(index)
        prompt = encode_item(tiny_policy, puzzle.item, instruction="", max_tokens=999)
        ids, targets, perception = policy_module._example(
            tiny_policy.tokenizer, puzzle, image_tokens=int(prompt.image_mask.sum())
        )
        asked = len(prompt.ids)
        assert torch.equal(ids[:asked], prompt.ids)
        assert targets[:asked].tolist() == [-100] * asked
        assert targets[asked:].tolist() == ids[asked:].tolist()
        assert not perception[:asked].any()


# The cache.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CPPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_half_of_the_pictures_it_reads_are_altered_as_preserving_views_are() -> None:
    task = ShapesTask(split="train", size=200, seed=1)
    puzzles = [task.puzzle(index) for index in range(len(task))]
    read = [policy_module._picture(p, n, WarmStart()) for n, p in enumerate(puzzles)]
    # A preserving view may leave a picture as it is.
    altered = [
        r.tobytes() != p.item.images[0].tobytes() for r, p in zip(read, puzzles, strict=True)
    ]
    assert 0.3 < sum(altered) / len(altered) < 0.55
    untouched = WarmStart(altered_share=0.0)
    assert policy_module._picture(puzzles[0], 0, untouched) is puzzles[0].item.images[0]
    assert set(policy_module.ALTERATIONS) == set(PRESERVED)


def test_more_cells_are_read_for_longer() -> None:
    assert WarmStart.of(1) == WarmStart()
    assert WarmStart.of(2).read_steps > WarmStart.of(1).read_steps


def test_the_policy_is_trained_once_and_then_found(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    train = policy_module._train

    def count(*arguments: Any) -> None:
        trained.append(arguments[1])
        train(*arguments)

    monkeypatch.setattr(policy_module, "_train", count)
    progress: list[int] = []
    first = ensure(1, settings=TINY, progress=progress.append)
    assert progress == list(range(1, TINY.steps + 1))
    assert ensure(1, settings=TINY, progress=progress.append) == first
    assert (trained, len(progress)) == ([1], TINY.steps)
    assert entries(cache) == [first.name]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(entries(first))


def test_another_difficulty_or_setting_is_another_entry(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "_train", lambda folder, *_: folder.mkdir())
    other = WarmStart(text_steps=3)
    folders = [ensure(1, settings=TINY), ensure(2, settings=TINY), ensure(1, settings=other)]
    assert len(set(folders)) == 3
    assert {folder.parent for folder in folders} == {cache}


def test_a_training_that_fails_leaves_nothing_behind(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, *_: Any) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(policy_module, "_train", fail)
    with pytest.raises(KeyboardInterrupt):
        ensure(1, settings=TINY)
    assert entries(cache) == []


def test_the_cache_lies_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CPPO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert policy_module.cache_folder() == tmp_path / ".cache" / "cppo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert policy_module.cache_folder() == tmp_path / "xdg" / "cppo"
    monkeypatch.setenv("CPPO_CACHE", "~/mine")
    assert policy_module.cache_folder() == tmp_path / "mine"


def _ensure_together(barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    train = policy_module._train

    def train_together(*arguments: Any) -> None:
        barrier.wait(60)  # both have found no entry
        train(*arguments)

    policy_module._train = train_together
    results.put(str(ensure(1, settings=TINY)))


def test_two_processes_at_once_end_with_one_whole_folder(cache: Path, tiny_folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_ensure_together, args=(barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    folders = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    [folder] = folders
    assert entries(cache) == [Path(folder).name]
    names = load_file(tiny_folder / "model.safetensors").keys()
    assert load_file(Path(folder) / "model.safetensors").keys() == names


def test_losing_the_race_at_the_very_last_moment_is_no_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def lose(self: Path, target: Path) -> Path:
        target.mkdir()
        (target / "config.json").write_text("theirs")
        return rename(self, target)

    def make(folder: Path, *_: Any) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("ours")

    monkeypatch.setattr(policy_module, "_train", make)
    monkeypatch.setattr(Path, "rename", lose)
    folder = ensure(1, settings=TINY)
    assert (folder / "config.json").read_text() == "theirs"
    assert entries(cache) == [folder.name]


def test_the_same_settings_train_the_same_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []
    for name in ("one", "two"):
        monkeypatch.setenv("CPPO_CACHE", str(tmp_path / name))
        torch.manual_seed(len(weights))  # what others drew before does not matter
        weights.append(load_file(ensure(1, settings=TINY) / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_training_the_policy_leaves_the_callers_random_state_alone(cache: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ensure(1, settings=TINY)
    assert torch.equal(torch.rand(3), expected)


# The patch embedding.


def test_the_patch_projection_computes_what_the_convolution_does(tokenizer: Any) -> None:
    embedding = build_model(tokenizer, seed=2).model.visual.patch_embed
    patches = torch.randn(37, embedding.proj.weight[0].numel(), dtype=torch.float64)
    embedding.double()
    expected = embedding(patches)
    found = PatchProjection(embedding.proj)(patches)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_prepared_model_keeps_its_outputs_and_its_saved_names(
    tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import Qwen2VLImageProcessorPil

    made = Qwen2VLImageProcessorPil(**IMAGE_PIXELS)(
        list(task().puzzle(0).item.images), return_tensors="pt"
    )
    model = build_model(tokenizer, seed=2).eval()
    tower = model.model.visual
    names = list(model.state_dict())
    with torch.no_grad():
        before = tower(made["pixel_values"], grid_thw=made["image_grid_thw"]).pooler_output
        model.save_pretrained(tmp_path / "before")
        QwenVL.prepare(model)
        after = tower(made["pixel_values"], grid_thw=made["image_grid_thw"]).pooler_output
    assert isinstance(tower.patch_embed, PatchProjection)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "after")
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        assert torch.equal(tensor, saved[1][name]), name
