"""Tests of data.py, tools."""

import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers import read_movie, run_here, write_movie

import data
from extras import importing, pictures, videos

TOOLS_VIDEOS = {  # file: (fps, rotation mark, upright width and height)
    "slow.mp4": (12, 0, (96, 72)),
    "pal.mp4": (25, 0, (96, 72)),
    "phone.mp4": (25, -90, (72, 128)),
    "phone2.mp4": (25, 90, (72, 128)),
    "sub/fast.mp4": (60, 0, (96, 72)),
    "ntsc.mkv": (Fraction(30000, 1001), 0, (128, 72)),
}
TOOLS_TIMES = (0.5, 1.37, 2.0, 3.251)
TOOLS_HEADER = "video,time_sec,x1,y1,x2,y2,label"


def tools_box(time_sec: float, size: tuple[int, int]) -> list[float]:
    """Where the square of tools_video is, in upright pixels: it crosses in four seconds."""
    x = (size[0] - 24) * time_sec / 4
    return [x, 20, x + 24, 44]


def tools_video(path: Path, rate: float, rotation: int, size: tuple[int, int]) -> None:
    """pal.mp4 has the full colour range, fast.mp4 begins at 91/60 s on its clock."""

    def stored(number: int, width: int, height: int) -> np.ndarray:
        upright = np.full((size[1], size[0], 3), 60, np.uint8)
        x = round(tools_box(number / rate, size)[0])
        upright[20:44, x : x + 24] = 230, 200, 40
        return np.ascontiguousarray(np.rot90(upright, -rotation // 90))

    write_movie(
        path,
        round(4 * rate),
        rate=rate,
        rotation=rotation,
        picture=stored,
        crf=16,
        size=size if rotation == 0 else size[::-1],
        preset="ultrafast",
        pix_fmt="yuvj420p" if path.stem == "pal" else "yuv420p",
        start=91 * (path.stem == "fast"),
        container={"movie_timescale": "90000"} if path.suffix == ".mp4" else {},
    )


@pytest.fixture(scope="module")
def tools_world(tmp_path_factory) -> Path:
    """Videos of many rates and orientations, and a csv in px with mistakes in its last lines."""
    folder = tmp_path_factory.mktemp("own")
    rows = [f"{TOOLS_HEADER},person"]
    for i, (name, (fps, rotation, size)) in enumerate(TOOLS_VIDEOS.items()):
        tools_video(folder / "videos" / name, fps, rotation, size)
        for time_sec in TOOLS_TIMES:
            corners = ",".join(f"{value:.3f}" for value in tools_box(time_sec, size))
            label = ["walk", "pick up"][(i + int(time_sec)) % 2]
            rows.append(f"{Path(name).name},{time_sec},{corners},{label},p{i}")
        rows.append(f"{Path(name).stem},2.0,{corners},{'Pick_Up' if i == 0 else ''},q")
    rows += [
        "nobody.mp4,1,0,0,5,5,walk,",
        "slow.mp4,4.5,0,0,5,5,walk,",
        "slow.mp4,3,200,0,250,50,walk,",
        "slow.mp4,3,-20,0,50,50,jump,",
    ]
    (folder / "labels.csv").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")  # as Excel
    return folder


@pytest.fixture
def tools_run(capsys):
    def run(*arguments, code: int = 0) -> str:
        assert importing.main([*map(str, arguments)]) == code, capsys.readouterr()
        return "".join(capsys.readouterr())

    return run


def tools_yellow(picture: np.ndarray) -> list[int]:
    """The box of the yellow square in a picture."""
    y, x = np.nonzero((picture[..., 0] > 150) & (picture[..., 2] < 120))
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_tools_import_of_own_csv_keeps_every_box_on_its_square(tools_world, tmp_path, tools_run):
    labels, recipe = tools_world / "labels.csv", tmp_path / "recipe.toml"
    printed = tools_run(
        "import", tools_world / "videos", tmp_path, "--annotations", labels, "--boxes", "px"
    )
    for line, text in (
        (6, "'Pick_Up' (1 rows) is taken as 'pick up'"),
        (33, "time 4.5 s"),
        (32, "0 videos are called 'nobody'"),
        (35, "box [-20.0"),
        (34, "box [200.0, 0.0, 250.0, 50.0] in a picture of 96 x 72"),
        (35, "'jump' is only in train, 1 videos have it"),
    ):
        assert f"problem: {labels}:{line}: {text}" in printed
    table = {line[:32].strip(): line[32:].split() for line in printed.splitlines()[1:4]}
    assert "6 problems" in printed
    assert table == {"jump": ["1", "1", "0"], "pick up": ["2", "11", "2"], "walk": ["3", "10", "2"]}
    (task, root, _), _ = videos._splits(recipe)
    parts = [data.open_task(task, root, part) for part in ("train", "val")]
    items = [
        item for part in parts for item in part.items if round(item.time_sec, 6) in TOOLS_TIMES
    ]
    assert len(items) == len(TOOLS_VIDEOS) * len(TOOLS_TIMES)
    for item in items:
        frame = data.decode_clip(item.path, [item.time_sec])[0]
        size = frame.shape[1::-1]
        (fps,) = (fps for name, (fps, *_) in TOOLS_VIDEOS.items() if item.path.endswith(f"/{name}"))
        moved = size[0] / 4 / fps  # the picture on screen may be up to one frame old
        apart = item.boxes[0] * [*size, *size] - tools_yellow(frame)
        assert np.abs(apart).max() < moved + 1.6, item
    texts = [(tmp_path / f"{part}.csv").read_text() for part in ("train", "val")]
    assert ",-1," in texts[0] and ",-1" not in texts[1]  # no AVA scorer knows -1
    tools_run("show", recipe, "--out", tmp_path / "a.png")
    picture = read_movie(tmp_path / "a.png")[1][0]
    assert (picture == pictures.GREEN).all(-1).sum() > 500 and tools_yellow(picture)
    assert "6 videos, 0 problems\n" in tools_run("check", recipe)
    small = "--device cpu --steps 3 --threads 1 --workers 0 --model.arch tiny --task.{0}.size 64 "
    small += "--task.{0}.short_side [64,64]"
    done = run_here(
        "cofinetune.py",
        "--recipe",
        recipe,
        "--out",
        tmp_path / "run",
        *small.format(task.name).split(),
    )  # it trains at once
    assert done.returncode == 0 and "mAP" in done.stdout, done.stdout + done.stderr


def test_tools_import_of_cvat_interpolates_and_names_lines(tools_world, tmp_path):
    def box(frame: int, x: int, attributes: str = "", outside: int = 0) -> str:
        return (
            f'<box frame="{frame}" outside="{outside}" xtl="{x}" ytl="40" xbr="{x + 48}" '
            f'ybr="88">{attributes}</box>'
        )

    ticks = '<attribute name="running">{}</attribute>\n<attribute name="hand">{}</attribute>'
    path, videos = tmp_path / "job.xml", data.Videos(str(tools_world / "videos"))
    path.write_text(
        "\n".join(
            [
                "<annotations><meta><task><id>7</id><original_size><width>192</width><height>144</height>",
                "</original_size><source>pal.mp4</source></task></meta>",
                '<track id="0" label="person">',
                box(0, 0, ticks.format("true", "waving")),
                box(50, 72, ticks.format("false", "none")),
                box(60, 80, outside=1),
                "</track>",
                '<track id="1" label="dog">',
                box(51, 0),
                "</track>",
                '<track id="2" label="dog">',
                box(25, 0),
                "</track></annotations>",
            ]
        )
    )
    marks = list(importing._cvat_rows(path, 1.0, [], videos))
    problems = [importing._fit(mark, videos) for mark in marks]
    assert [(mark.label, mark.time_sec) for mark in marks if len(mark.box)] == [
        ("running", 0),
        ("waving", 0),
        ("running", 1),
        ("waving", 1),
        ("", 2),
        ("dog", 1),
    ]
    between = [36 / 192, 40 / 144, 84 / 192, 88 / 144]  # frame 25 of 0 to 50
    assert np.allclose(marks[2].box, between) and problems.count("") == 6
    assert marks[5].where == f"{path}:11" and "smaller --every-sec" in problems[5]
    every = importing._cvat_rows(path, 0, ["hand"], videos)
    assert [mark.label for mark in every] == ["waving", "", "dog", "dog"]
    assert len(list(importing._cvat_rows(path, 0.001, [], videos))) < 200  # a frame once at most
    turned = box(0, 40).replace("<box", '<box rotation="90"').replace('ybr="88"', 'ybr="60"')
    path.write_text(f"<annotations><track>{turned}</track></annotations>")
    ((*_, (found,)),) = importing._cvat_tracks(path)
    assert np.allclose(found["corners"], [54, 26, 74, 74])  # 48 x 20 px about 64, 50


@pytest.mark.parametrize(
    "text, unit, message",
    [
        (f"{TOOLS_HEADER[:10]},x1,y1,x2,y2,label\n", "px", ":1: no column time_sec, expected"),
        (f"{TOOLS_HEADER}\npal,1,0,0,2,x,walk\n", "px", ":2: .*'x'.*expected numbers"),
        (f"{TOOLS_HEADER}\npal,1,30,20,60,50,walk\n", "norm", "0 of 1 rows .* --boxes norm"),
        (
            f"{TOOLS_HEADER}\npal,1,.1,.2,.6,.5,walk\n",
            "px",
            "0 of 1 rows can be used, with --boxes px",
        ),
        (f"{TOOLS_HEADER}\npal,1,.1,.2,.6,.5,pick up, fast\n", "norm", ":2: 1 columns more than"),
        (
            f"{TOOLS_HEADER}\npal,1,.1,.2,.6,.5,gr\xfc\xdfen\n",
            "norm",
            "a.csv: byte 53 is not UTF-8",
        ),
        (f"{TOOLS_HEADER}\npal,1,.1,.2,.6,.5,walk\n", "norm", "1 videos with labels, expected two"),
        ("pal,1,.1,.2,.6,.5,walk,3\n", "norm", ":1: .*'walk'"),
        (
            "<annotations>\n<image/></annotations>",
            "px",
            ":2: an <image>, so this is CVAT for images",
        ),
    ],
)
def test_tools_import_refuses_with_file_and_line(tools_world, tmp_path, text, unit, message):
    path = tmp_path / ("a.xml" if text.startswith("<") else "a.csv")
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        importing.import_labels(tools_world / "videos", tmp_path / "out", path, unit)
    assert not (tmp_path / "out").exists()


def test_tools_import_never_overwrites_what_it_reads(tools_world, tmp_path):
    text = "".join(f"{name},1,0.1,0.1,0.5,0.5,1,0\n" for name in ("pal", "slow"))
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="train.csv would be overwritten"):
        importing.import_labels(tools_world / "videos", tmp_path, path)
    assert path.read_text() == text


def test_tools_import_of_folders_per_class(tools_world, tmp_path, tools_run):
    for name in ("turn left", "Turn_Left 2"):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for i in range(5):
            clip = tmp_path / "clips" / name / f"{name[0]}{i}.mp4"
            clip.symlink_to(tools_world / "videos" / "slow.mp4")
    printed = tools_run("import", tmp_path / "clips", tmp_path / "out", "--val-share", "0.4")
    assert "6 videos to train, 4 to validate; 0 problems" in printed
    (task, root, _), _ = videos._splits(tmp_path / "out" / "recipe.toml")
    train, val = (data.open_task(task, root, part) for part in ("train", "val"))
    assert task.flip == 0 and train.classes == ["turn left", "Turn_Left 2"]
    assert min(val.class_counts().values()) > 0 and sum(val.class_counts().values()) == 4
    assert all(train.classes[item.label] in item.path for item in train.items)


def test_tools_split_keeps_classes_in_both_parts():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        videos = {f"v{i}": {f"c{c}" for c in range(12) if rng.random() < 0.25} for i in range(20)}
        videos |= {"only": {"lonely"}}
        chosen = importing.split_videos(videos, 0.2, seed)
        assert chosen == importing.split_videos(videos, 0.2, seed) and 4 <= len(chosen) <= 5
        for name in set().union(*videos.values()):
            there = {video for video in videos if name in videos[video]}
            assert there - chosen and (len(there) < 2 or there & chosen), (seed, name)


def test_tools_pictures_come_back_as_drawn(tmp_path):
    frame, colours = np.full((241, 321, 3), 200, np.uint8), [(0, 255, 0), (255, 0, 0), (0, 0, 255)]
    boxes = [[0.25, 0.5, 0.5, 0.75], [0.25, 0.5, 0.5, 0.75], [0.9, 0.95, 1.0, 1.0]]
    texts = [["true"], ["0.93 walk", "x" * 99], ["corner"]]
    drawn = pictures.draw_boxes(frame, boxes, texts, colours)
    assert (drawn[120:181, [80, 159]] == colours[1]).all()
    assert (drawn[[120, 180], 80:160] == colours[1]).all()
    assert all((drawn == colour).all(-1).sum() > 20 for colour in colours) and (frame == 200).all()
    assert pictures.draw_boxes(frame[:48, :64], [], [], pictures.GREEN).shape == (240, 320, 3)
    glyphs = pictures._glyphs()
    assert not glyphs[0].any() and len({glyph.tobytes() for glyph in glyphs}) == 95
    series = {"loss": ([0, 1, 2, 3], [3.0, float("nan"), 1.0, 0.5]), "one": ([2], [2.0])}
    curves = pictures.draw_curves(series | {"none": ([], [])}, "run")
    line = (curves[30:] == pictures.CURVES[0]).all(-1)
    rows = [line[:, x].nonzero()[0].mean() for x in (80, 300, 600)]
    assert rows == sorted(rows)  # a falling loss falls
    assert pictures.draw_curves({}).shape == curves.shape
    pictures.write_png(tmp_path / "a.png", sheet := pictures.grid([drawn, curves, frame]))
    assert np.array_equal(read_movie(tmp_path / "a.png")[1][0], sheet)
    head = (tmp_path / "a.png").read_bytes()[12:33]
    assert zlib.crc32(head[:17]).to_bytes(4, "big") == head[17:]  # browsers look
    pictures.write_video(tmp_path / "a.mp4", (frame for _ in range(5)), 30000 / 1001)
    clip = data.decode_clip(tmp_path / "a.mp4", [0, 0.1])
    assert clip.shape == (2, 242, 322, 3) and np.abs(clip.astype(int) - 200).max() < 4
    with pytest.raises(ValueError, match="no frames"):
        pictures.write_video(tmp_path / "b.mp4", [], 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.png"]
