"""Test the published sets of questions about videos: their files are read as items, and errors name the file."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import mllm
from mllm.config.data import DataSpec
from mllm.data.items import Item
from mllm.data.sources import read_all
from mllm.errors import MLLMError
from mllm.media.videos import VideoFile, open_clip
from mllm.testing import tiny_video

NEXT_COLUMNS = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
OPEN_COLUMNS = "video,frame_count,width,height,question,answer,qid,type,additional_ref_answer"
MME = {
    "video_id": ["001"],
    "duration": ["short"],
    "domain": ["Knowledge"],
    "videoID": ["fFjv93ACGo8"],
    "question_id": ["001-1"],
    "task_type": ["Counting Problem"],
    "question": ["When demonstrating?\n"],
    "options": [["A. Apples.", "B. Candles.", "C. Berries.", "D. All kinds."]],
    "answer": ["C"],
}

# suite -> files (videos by the number of their frames), and for each item: id, video, question, answers, kind, choices
CASES: dict[str, tuple[dict[str, Any], list[tuple[Any, ...]]]] = {
    "msvd-qa": (
        {
            "test_qa.json": [
                {"answer": "chop", "id": 30933, "question": "what does a man do?", "video_id": 1301},
                {"answer": "someone", "id": 30934, "question": "who chops it?", "video_id": 1302},
            ],
            "youtube_mapping.txt": "-4wsuPCjDBc_5_15 vid1301\n-7KMZQEsJW4_205_208 vid1302\n",
            "videos/-4wsuPCjDBc_5_15.avi": 3,
            "videos/-7KMZQEsJW4_205_208.avi": 2,
        },
        [
            ("30933", "-4wsuPCjDBc_5_15.avi", "what does a man do?", ["chop"], "what", []),
            ("30934", "-7KMZQEsJW4_205_208.avi", "who chops it?", ["someone"], "who", []),
        ],
    ),
    "msrvtt-qa": (
        {
            "test_qa.json": [
                {"answer": "couch", "category_id": 14, "id": 158581}
                | {"question": "what are three people sitting on?", "video_id": 7010}
            ],
            "videos/video7010.mp4": 3,
        },
        [("158581", "video7010.mp4", "what are three people sitting on?", ["couch"], "what", [])],
    ),
    "activitynet-qa": (
        {
            "test_q.json": [
                {"question": "is the athlete wearing trousers", "video_name": "1QIUV7WYKXg"}
                | {"question_id": "1QIUV7WYKXg_3"},
                {"question": "what is behind him", "video_name": "9eniCub7u60", "question_id": "9eniCub7u60_1"},
            ],
            "test_a.json": [
                {"answer": "tree", "type": 1, "question_id": "9eniCub7u60_1"},
                {"answer": "yes", "type": 3, "question_id": "1QIUV7WYKXg_3"},
            ],
            "videos/v_1QIUV7WYKXg.mp4": 2,
            "videos/9eniCub7u60.mkv": 2,
        },
        [
            ("1QIUV7WYKXg_3", "v_1QIUV7WYKXg.mp4", "is the athlete wearing trousers", ["yes"], "yes/no", []),
            ("9eniCub7u60_1", "9eniCub7u60.mkv", "what is behind him", ["tree"], "spatial", []),
        ],
    ),
    "next-qa": (
        {
            "val.csv": f"{NEXT_COLUMNS}\n"
            '4010069381,369,640,480,how do the two man play,0,6,CH,roll it,"tap, then feet",strum it,hit it,pat it\n',
            "map_vid_vidorID.json": {"4010069381": "1164/4010069381"},
            "NExTVideo/1164/4010069381.mp4": 2,
        },
        [
            (
                *("4010069381/6", "4010069381.mp4", "how do the two man play", ["roll it"], "CH"),
                ["roll it", "tap, then feet", "strum it", "hit it", "pat it"],
            )
        ],
    ),
    "video-mme": (
        {"videomme/test-00000-of-00001.parquet": MME, "data/fFjv93ACGo8.mp4": 2},
        [
            (
                *("001-1", "fFjv93ACGo8.mp4", "When demonstrating?", ["Berries."], "short"),
                ["Apples.", "Candles.", "Berries.", "All kinds."],
            )
        ],
    ),
    "mvbench": (
        {
            "json/action_sequence.json": [
                {"video": "ZS9XR.mp4", "question": "What happened?", "candidates": ["Ate.", "Tidied."]}
                | {"answer": "Ate.", "question_id": "Interaction_T1_13", "start": 0.2, "end": 0.6}
            ],
            "json/moving_count.json": [
                {"video": "video_10009.mp4", "question": "How many?", "candidates": ["3", "4"], "answer": "4"}
            ],
            "video/star/Charades_v1_480/ZS9XR.mp4": 8,
            "video/clevrer/video_validation/video_10009.mp4": 2,
        },
        [
            ("action_sequence/0", "ZS9XR.mp4", "What happened?", ["Ate."], "action_sequence", ["Ate.", "Tidied."]),
            ("moving_count/0", "video_10009.mp4", "How many?", ["4"], "moving_count", ["3", "4"]),
        ],
    ),
}


def write_files(folder: Path, files: dict[str, Any]) -> Path:
    """Write files: videos with as many frames as their number says, tables, texts, else JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            tiny_video(path, [Image.new("L", (32, 32), 30 * frame) for frame in range(content)])
        elif path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table(content), path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def items_of(suite: str, folder: Path, *overrides: str) -> list[Item]:
    module = import_module("mllm.eval.suite")
    items: list[Item] = module.read_items(module.load_suite(suite, overrides), folder)
    return items


@pytest.mark.parametrize("suite", CASES)
def test_published_files_are_read_as_items(suite: str, tmp_path: Path) -> None:
    files, expected = CASES[suite]
    items = items_of(suite, write_files(tmp_path, files))
    rows = [
        (i.id, i.images[0].path.name, i.question, list(i.answers), i.kind, list(i.choices))  # type: ignore[attr-defined]
        for i in items
    ]
    assert rows == expected
    assert all(isinstance(item.images[0], VideoFile) and open_clip(item.images[0], 2) for item in items)


@pytest.mark.parametrize("suite", CASES)
def test_damaged_files_and_missing_videos_are_named(suite: str, tmp_path: Path) -> None:
    files, _ = CASES[suite]
    write_files(tmp_path, files)
    video = next(name for name, content in files.items() if isinstance(content, int))
    (tmp_path / video).unlink()
    with pytest.raises(MLLMError, match=f"images are missing: .*{Path(video).stem}"):
        items_of(suite, tmp_path)
    table = next(iter(files))
    written = (tmp_path / table).read_bytes()
    (tmp_path / table).write_bytes(written[: len(written) // 2])
    with pytest.raises(MLLMError, match=Path(table).name):
        items_of(suite, tmp_path)


def test_a_part_of_a_video_is_shown(tmp_path: Path) -> None:
    """The rate is 10 frames per second: from 0.2 to 0.6 seconds are the frames 2 to 5."""
    item = items_of("mvbench", write_files(tmp_path, CASES["mvbench"][0]))[0]
    frames = open_clip(item.images[0], 4).frames
    assert [round(sum(frame.getpixel((9, 9))) / 90) for frame in frames] == [2, 3, 4, 5]
    whole = VideoFile(item.images[0].path)  # type: ignore[attr-defined]
    assert whole.key() != item.images[0].key()
    with pytest.raises(MLLMError, match=r"ZS9XR\.mp4 has 0\.8 seconds, and the part of it starts at 9"):
        open_clip(VideoFile(whole.path, 9.0), 2)


def test_open_answers_of_next_qa(tmp_path: Path) -> None:
    text = f"{OPEN_COLUMNS}\n41,9,6,4,what is it,dog,0,DO,puppy\n41,9,6,4,who is it,boy,1,DO,\n"
    write_files(tmp_path, {"o.csv": text, "map.json": {"41": "0/41"}, "v/0/41.mp4": 2})
    options = {"annotations": str(tmp_path / "o.csv"), "images": str(tmp_path / "v"), "task": "open"}
    spec = DataSpec(format="next-qa", mapping=str(tmp_path / "map.json"), **options)  # type: ignore[call-arg, arg-type]
    assert [item.answers for item in read_all([spec])[0].items] == [("dog", "puppy"), ("boy",)]


@pytest.mark.parametrize(
    ("suite", "file", "content", "message"),
    [
        ("msvd-qa", "youtube_mapping.txt", "one\n", r"youtube_mapping\.txt .*name and number"),
        ("msvd-qa", "youtube_mapping.txt", "one vid7\n", r"test_qa\.json.*vid1301"),
        ("activitynet-qa", "test_a.json", [], r"'1QIUV7WYKXg_3' has no answer"),
        ("next-qa", "map_vid_vidorID.json", {}, r"val\.csv.*4010069381"),
        ("next-qa", "val.csv", f"{NEXT_COLUMNS}\n4010069381,9,6,4,how,7,6,CH,a,b,c,d,e\n", "right choice is 7"),
        ("video-mme", "videomme/test-00000-of-00001.parquet", {**MME, "answer": ["F"]}, "row 0"),
        (
            "mvbench",
            "json/moving_count.json",
            [{"video": "video_10009.mp4", "question": "?", "candidates": ["a"], "answer": "b"}],
            "'b' is none of the candidates",
        ),
    ],
)
def test_wrong_rows_are_named(suite: str, file: str, content: Any, message: str, tmp_path: Path) -> None:
    write_files(tmp_path, {**CASES[suite][0], file: content})
    with pytest.raises(MLLMError, match=message):
        items_of(suite, tmp_path)


@pytest.mark.parametrize("suite", ["msrvtt-qa", "mvbench"])
@pytest.mark.parametrize("sampling", [{"fps": 5}, {"frames": 2}])
def test_a_suite_of_videos_is_answered(suite: str, sampling: dict[str, Any], tmp_path: Path, tiny_parts: Any) -> None:
    folder = write_files(tmp_path, CASES[suite][0])
    model = mllm.assemble({"type": "video", "of": {"model": tiny_parts[0]}, **sampling}, tiny_parts[1], "linear")
    names = ["blind", "random-connector", *(["mean-image"] if "fps" in sampling else [])]
    report = mllm.evaluate(model, suite, folder, out=tmp_path / "out", baselines=names)
    items = items_of(suite, folder)
    assert [row["id"] for row in report.rows] == [item.id for item in items]
    if suite == "msrvtt-qa":
        prompt = [*items[0].images, model.spec.prompt.question.format(question=items[0].question)]
        assert report.rows[0]["prediction"] == str(model.generate([prompt], max_new_tokens=10)[0])
    assert (tmp_path / "out/index.html").exists() or list((tmp_path / "out").glob("*.html"))


@pytest.mark.parametrize("mark", ["<video>", "<image>"])
def test_conversations_about_a_video(mark: str, tmp_path: Path) -> None:
    """LLaVA-Video writes the mark of an image, others that of a video."""
    turns = [{"from": "human", "value": f"{mark}\nWhat happens?"}, {"from": "gpt", "value": "A man runs."}]
    write_files(tmp_path, {"c.json": [{"id": "a", "video": "v/1.mp4", "conversations": turns}], "v/1.mp4": 2})
    spec = DataSpec(format="llava", path=str(tmp_path / "c.json"), images=str(tmp_path))  # type: ignore[call-arg]
    (item,) = read_all([spec])[0].items
    assert item.images == (VideoFile(tmp_path / "v/1.mp4"),)
    first, second = item.messages
    assert first["content"] == [{"type": "image", "image": item.images[0]}, {"type": "text", "text": "What happens?"}]
    assert second["content"] == [{"type": "text", "text": "A man runs."}]
