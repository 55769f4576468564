"""Tests of data.py, the section "Decoding"."""

import os
import shutil
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from helpers import H264, MPEG4, SHARED, movie_frame, movie_number, read_movie, write_movie

import data


def numbers(path, times):
    return [int(movie_number(image)) for image in data.decode_clip(path, times)]


def duration(path):
    found = []

    def times(seconds):
        found.append(seconds)
        return [0.0]

    data.decode_clip(path, times)
    return found[0]


MOVIES = {
    "h264.mp4": H264,
    "pyramid.mkv": dict(H264, refs=4, **{"x264-params": "b-pyramid=normal:open-gop=1"}),
    "ts.ts": H264,
    "live.mkv": dict(H264, container={"live": "1"}),  # no duration, of neither file nor stream
    "ten.mp4": dict(H264, pix_fmt="yuv420p10le"),
    "odd.mkv": dict(H264, pix_fmt="yuv444p", size=(99, 65)),
    "ntsc.mp4": dict(H264, rate=Fraction(30000, 1001)),
    "film.mkv": dict(H264, rate=12),
    # Each picture renews a part of the one before; a seek finds none that is whole.
    "refresh.mp4": dict(codec="libx264", **{"x264-params": "intra-refresh=1:keyint=30"}),
    "hevc.mp4": dict(codec="libx265", **{"x265-params": "keyint=24:bframes=4:log-level=none"}),
    "vp9.webm": dict(codec="libvpx-vp9", g=24, deadline="realtime", **{"cpu-used": 8}),
    "av1.mkv": dict(codec="libsvtav1", preset=12, g=24, **{"svtav1-params": "lp=1"}),
    "mpeg4.mp4": MPEG4,
    "mpeg4.avi": MPEG4,
    "a.flv": H264,
    "a.wmv": dict(codec="wmv2", g=24),
    "a.mxf": dict(codec="mpeg2video", g=12, bf=2),
    "dvd.vob": dict(codec="mpeg2video", g=12, bf=2),
    "mpeg2.ts": dict(codec="mpeg2video", g=12, bf=2),
    "xvid.avi": dict(codec="mpeg4", g=24),
    "baseline.avi": dict(H264, bf=0),
    "gaps.mkv": dict(H264, pts=np.cumsum(np.random.default_rng(3).integers(20, 220, 90)) - 20),
    "late.mp4": dict(H264, start=50),
}


def test_decoder_duration_is_counted_from_the_first_frame(tmp_path):
    for name in ("late.mkv", "late.mp4", "late.ts", "late.webm", "late.mov"):
        codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
        path = write_movie(tmp_path / name, frames=50, start=50, codec=codec)
        assert duration(path) == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("name", MOVIES)
def test_decoder_equals_full_decode(name, tmp_path):
    """Any window of any file: the pixels of decoding all of it, and the numbers on screen then."""
    path, pts = write_movie(tmp_path / name, **MOVIES[name]), MOVIES[name].get("pts")
    times = np.arange(90) / float(MOVIES[name].get("rate", 25))
    times = times if pts is None else (pts - pts[0]) / 1000
    full = read_movie(path)[1]
    assert [movie_number(image) for image in full] == list(range(90))
    rng = np.random.default_rng(0)
    for window in range(10):
        wanted = rng.uniform(-0.2, times[-1] + 0.2) + np.arange(8) * rng.uniform(0.01, 0.1)
        near = np.abs(wanted[:, None] - times).min(1) < 0.001
        wanted += 0.002 * near  # Matroska rounds to milliseconds
        if window < 3:  # exactly at a frame's own time it is that frame
            wanted = times[rng.permutation(90)[:6]] if window else times[[0, 1, 89]]
        expected = (np.searchsorted(times, wanted + 5e-4, side="right") - 1).clip(0, 89)
        clip = data.decode_clip(path, wanted)
        assert [movie_number(image) for image in clip] == expected.tolist(), window
        assert np.array_equal(clip, full[expected])
    assert abs(duration(path) - times[-1]) < 0.3 + (pts is not None)


def test_decoder_skips_what_nobody_needs(tmp_path, monkeypatch):
    """Of 1500 frames, fewer come out of the decoder for four than lie between keyframe and last."""
    path, decoded = write_movie(tmp_path / "long.mp4", 1500, **H264), []

    class Decoder:  # a codec context cannot be patched; it can be stood in for
        def __init__(self, context):
            self.context = context

        def decode(self, packet):
            self.context.skip_frame = self.skip_frame
            decoded.extend(frames := self.context.decode(packet))
            return frames

    decode = data._decode
    monkeypatch.setattr(data, "_decode", lambda context, *rest: decode(Decoder(context), *rest))
    clip = data.decode_clip(path, [40.0, 40.5, 41.0, 41.5])
    assert [movie_number(image) for image in clip] == [1000, 1012, 1025, 1037]
    assert 4 <= len(decoded) < 40  # of 62


def test_decoder_seeks_further_back(tmp_path, monkeypatch):
    """A late seek costs a second one, not the whole file: windows tried for frame 500 of 600."""
    tried, read = [], data._read_window
    late = 0

    class Stream:  # its first seek ends `late` ticks too late, on a keyframe
        def __init__(self, stream):
            self.stream, self.container = stream, self

        def __getattr__(self, name):
            return getattr(self.stream, name, None) or getattr(self.stream.container, name)

        def demux(self, stream):
            return self.stream.container.demux(self.stream)

        def seek(self, offset, stream):
            self.stream.container.seek(offset + (0 if tried else late), stream=self.stream)

    def window(stream, *rest):
        tried.append(read(Stream(stream), *rest))
        return tried[-1]

    monkeypatch.setattr(data, "_read_window", window)
    for name, codec, late, expected in (  # noqa: B007, `Container` reads it
        ("a.mp4", H264, 0, [True]),
        ("a.ts", H264, 0, [False, True]),
        ("a.avi", MPEG4, 0, []),
        ("b.mp4", H264, 12800, [False, True]),
    ):
        path = write_movie(tmp_path / name, 600, **codec)
        assert movie_number(data.decode_clip(path, [19.9, 20.0])[1]) == 500
        assert tried == expected, name
        tried.clear()


def test_decoder_sizes_and_rotation(tmp_path):
    plain = write_movie(tmp_path / "plain.mp4", 10, **H264)
    turned = write_movie(tmp_path / "turned.mp4", 10, rotation=-90, **H264)
    a, b = data.decode_clip(plain, [0.2]), data.decode_clip(turned, [0.2])
    assert b.shape == (1, 96, 64, 3) and np.array_equal(b, np.rot90(a, 3, (1, 2)))
    for path, turn in ((plain, 1), (turned, -1)):
        for options, shape in (
            (dict(short_side=32), (32, 48)),
            (dict(short_side=50, multiple=16), (48, 80)),
        ):
            assert data.decode_clip(path, [0, 0.1], **options).shape == (2, *shape[::turn], 3)
        assert data.decode_clip(path, [0], size=(40, 20)).shape == (1, 40, 20, 3)
    half = torch.from_numpy(a).permute(0, 3, 1, 2).float()
    half = torch.nn.functional.interpolate(half, (32, 48), mode="area").permute(0, 2, 3, 1)
    assert np.abs(half.numpy() - data.decode_clip(plain, [0.2], short_side=32)).mean() < 5


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared videos are not here")
def test_decoder_real_videos():
    reference = np.load(SHARED / "videos/nasa_13013.stream3.frames.npz")
    times = reference["index"] * 1001 / 30000
    clip = data.decode_clip(SHARED / "videos/nasa_13013.mp4", times)
    assert np.array_equal(clip, reference["rgb"])
    for name in ("av1_video.mkv", "h264_10bits.mp4", "h265_video.mp4"):
        times, frames = read_movie(SHARED / "videos" / name)
        picked = np.random.default_rng(0).permutation(len(frames))[:8]
        wanted = [float(times[i] - times[0]) for i in picked]
        assert np.array_equal(data.decode_clip(SHARED / "videos" / name, wanted), frames[picked])


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="open files cannot be counted here")
def test_decoder_damaged_files(tmp_path):
    """One sentence with the path; nothing stays open, also when it fails."""
    good = write_movie(tmp_path / "good.mp4", **H264)
    content = good.read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "page.mp4").write_bytes(b"<html>404</html>" * 99)
    (tmp_path / "half.mp4").write_bytes(content[: len(content) // 2])
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        sound.rate = 16000
        file.mux(stream.encode(sound))
        file.mux(stream.encode(None))
    before = len(os.listdir("/dev/fd"))
    for name in ["empty.mp4", "page.mp4", "half.mp4", "sound.mp4", "absent.mp4"] * 20:
        with pytest.raises(data.DecodeError, match=name):
            data.decode_clip(tmp_path / name, [0.0])
    for time_sec, text in ((902, "902.000"), (-3, "-3.000")):  # a wrong offset: no set of stills
        with pytest.raises(data.DecodeError, match=text):
            data.decode_clip(good, [time_sec])
    for _ in range(300):
        data.decode_clip(good, [0.5])
    assert len(os.listdir("/dev/fd")) <= before + 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_decoder_memory_is_flat(tmp_path):
    import resource

    path = write_movie(tmp_path / "v.mp4", **H264)
    for turn in range(2300):
        data.decode_clip(path, [1.0, 1.5], short_side=48)
        if turn == 300:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024  # KiB


# what real files do ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "codec", [dict(codec="mpeg4", g=12), MPEG4, H264, dict(H264, bf=0), dict(codec="mjpeg")]
)
def test_decoder_keeps_the_gaps_of_an_avi(codec, tmp_path):
    """A recorder that drops frames leaves empty chunks: what comes later stays in its place."""
    shown = [*range(10), *range(20, 50)]
    if codec["codec"] == "mjpeg":
        codec = dict(codec, pix_fmt="yuvj420p")
    path = write_movie(
        tmp_path / "gap.avi",
        40,
        picture=lambda i, *size: movie_frame(shown[i], *size),
        pts=[i * 40 for i in shown],
        **codec,
    )
    times = np.arange(50) / 25
    expected = [max(k for k in shown if k <= i) for i in range(50)]
    if codec.get("bf", 0) == 0:
        assert numbers(path, times) == expected
        for window in (slice(5, 9), slice(14, 30), slice(40, 50)):
            assert numbers(path, times[window]) == expected[window]
    else:  # frames around the gap were sent before it and are stamped behind: at most B-frames
        assert (
            np.abs(np.array(numbers(path, times)) - expected)[[*range(8), *range(24, 50)]].max()
            == 0
        )
    assert duration(path) == pytest.approx(2.0)


def test_decoder_counts_between_the_stamps_of_a_program_stream(tmp_path):
    """FFmpeg gives H.264 in one only the few times that are written there."""
    path = write_movie(tmp_path / "recorder.mpg", 90, **dict(H264, g=12))
    with av.open(str(path)) as file:
        assert sum(packet.pts is not None for packet in file.demux(video=0)) < 10
    assert numbers(path, np.arange(90) / 25) == [*range(90)]
    assert numbers(path, [2.0, 2.4, 3.2]) == [50, 60, 80]
    assert duration(path) == pytest.approx(3.6, abs=0.1)


def test_decoder_leaves_time_for_avi_packets_without_a_picture(tmp_path):
    """MPEG-4 can say "as before" in a packet of a few bytes, out of which no frame comes."""
    path = write_movie(
        tmp_path / "a.avi",
        50,
        codec="mpeg4",
        g=100,
        picture=lambda i, *size: movie_frame(19 if i in (20, 21) else i, *size),
    )
    as_before = b"\x00\x00\x01\xb6" + bytes([0b01_0_1_0000, 0b0_1_0_11111])  # a P-VOP, not coded
    with av.open(str(path)) as file, av.open(str(tmp_path / "b.avi"), "w") as output:
        stream = file.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for packet in file.demux(stream):
            if packet.pts in (20, 21):
                bare = av.Packet(as_before)
                bare.pts, bare.dts, bare.time_base = packet.pts, packet.dts, packet.time_base
                packet = bare
            if packet.size:
                packet.stream = copy
                output.mux(packet)
    assert len(read_movie(tmp_path / "b.avi")[1]) == 48
    expected = [19 if i in (20, 21) else i for i in range(50)]
    assert numbers(tmp_path / "b.avi", np.arange(50) / 25) == expected
    with data.open_stream(tmp_path / "b.avi") as stream:
        ticks = [tick for tick, _ in data.frames_in_order(stream)]
    assert ticks == [i for i in range(50) if i not in (20, 21)]


RAW = {
    "h264": H264,
    "hevc": dict(codec="libx265", **{"x265-params": "keyint=24:bframes=3:log-level=none"}),
    "m2v": dict(codec="mpeg2video", g=12, bf=2),
}


@pytest.mark.parametrize("kind", RAW)
@pytest.mark.parametrize("rate", [25, 30, Fraction(30000, 1001)])
def test_decoder_reads_streams_without_a_container(kind, rate, tmp_path):
    """They refuse to seek and know no times: frames are counted at the rate of the codec."""
    raw = write_movie(tmp_path / f"a.{kind}", 60, rate=rate, **RAW[kind])
    path = raw.rename(tmp_path / "a.mp4")
    times = np.arange(60) / float(rate)
    assert numbers(path, times) == [*range(60)]
    assert numbers(path, times[[31, 7, 59]]) == [31, 7, 59]
    assert duration(path) == pytest.approx(60 / float(rate), abs=0.001)


@pytest.mark.parametrize("name", ["a.ts", "a.mpg", "b.ts", "a.m2v", "a.h264"])
@pytest.mark.parametrize("share", [0.3, 0.37, 0.5])
def test_decoder_reads_files_that_begin_inside_a_group_of_pictures(name, share, tmp_path):
    """The first frame that can be decoded is held; the others are what a decoder makes of them."""
    codec = dict(H264, g=12) if name in ("a.ts", "a.h264") else RAW["m2v"]
    content = write_movie(tmp_path / "whole" / name, 60, **codec).read_bytes()
    cut = int(len(content) * share) // 188 * 188
    path = tmp_path / name
    path.write_bytes(content[cut:])
    with data.open_stream(path) as stream:
        start, base = stream.start_time or 0, stream.time_base
        frames = []
        for tick, frame in data.frames_in_order(stream):
            frames.append(
                (float((tick - start) * base), movie_number(frame.to_ndarray(format="rgb24")))
            )
    shown = [int(number) for _, number in frames]
    assert shown == [*range(shown[0], 60)] and shown[0] > 0
    assert numbers(path, [0.0]) == [shown[0]]
    seen = {at: int(number) for at, number in frames}  # of two at a time the later one
    assert numbers(path, list(seen)) == list(seen.values()) and len(seen) > len(shown) - 3
    if name.endswith("ts") or name == "a.mpg":  # they have a clock, which goes on counting
        assert frames[0][0] > 0


@pytest.mark.parametrize(
    "codec, suffix",
    [("libvpx", "mkv"), ("libvpx-vp9", "mkv"), ("libvpx-vp9", "mp4"), ("libx264", "mkv")],
)
def test_decoder_reads_recordings_that_lost_their_first_key_frame(codec, suffix, tmp_path):
    """WebRTC's, say: VP8 and VP9 raise for every frame until the next one."""
    path = write_movie(tmp_path / f"whole.{suffix}", 90, codec=codec, g=24)
    cut = tmp_path / f"a.{suffix}"
    with av.open(str(path)) as file, av.open(str(cut), "w") as output:
        stream = file.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for number, packet in enumerate(file.demux(stream)):
            if packet.size and number >= 6:
                packet.stream = copy
                output.mux(packet)
    with av.open(str(cut)) as file:
        start = float(file.streams.video[0].start_time * file.streams.video[0].time_base)
    assert 0.1 < start < 0.4
    clip = numbers(cut, [0, 0.4, 1.0, 2.0])
    assert clip[0] == clip[1] == 24
    assert clip[2:] == [int((start + at) * 25 + 0.01) for at in (1.0, 2.0)]


def test_decoder_refuses_a_song_with_a_cover(tmp_path):
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as file:
        sound, cover = file.add_stream("libmp3lame", rate=44100), file.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = data.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")
        file.mux([*cover.encode(picture), *cover.encode(None)])
        tone = av.AudioFrame.from_ndarray(np.zeros((2, 44100), np.float32), "fltp", "stereo")
        tone.rate = 44100
        file.mux([*sound.encode(tone), *sound.encode(None)])
    with pytest.raises(data.DecodeError, match="song.mp3: no video, only sound with a cover"):
        data.decode_clip(path, [0.5])


MPEG2 = dict(codec="mpeg2video", g=12, bf=2)


@pytest.mark.parametrize(
    "suffix, codec, starts",
    [
        ("ts", H264, (0, 0)),
        ("ts", H264, (0, 0, 0)),
        ("ts", H264, (0, 25_000)),  # a clock that jumps ahead, and one that is taken for wrapped
        ("ts", H264, (25_000_000, 0)),
        ("ts", MPEG2, (0, 0)),
        ("mpg", MPEG2, (0, 0)),
        ("vob", MPEG2, (0, 20)),
        ("avi", MPEG4, (0, 0)),
        ("h264", H264, (0, 0)),
    ],
)
def test_decoder_goes_on_where_recordings_were_joined(suffix, codec, starts, tmp_path):
    parts = []
    for start in starts:
        parts.append(write_movie(tmp_path / f"{start}.{suffix}", 50, start=start, **codec))
    path = tmp_path / f"joined.{suffix}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    count = 50 * len(parts)
    times = np.arange(count) / 25
    assert numbers(path, times) == [*range(50)] * len(parts)
    picked = [3, count // 2 + 10, count - 1]
    assert numbers(path, times[picked]) == [number % 50 for number in picked]
    if suffix != "avi":  # whose header is the first one's
        assert duration(path) == pytest.approx(count / 25, abs=0.05)


def test_decoder_joins_pieces_of_half_a_second(tmp_path):
    piece = write_movie(tmp_path / "a.ts", 12, **H264).read_bytes()
    (tmp_path / "b.ts").write_bytes(piece * 4)
    assert numbers(tmp_path / "b.ts", np.arange(48) / 25) == [*range(12)] * 4


def test_decoder_keeps_a_pause_of_a_broadcast(tmp_path):
    """A clock that stands still for some seconds is no other clock."""
    pts = [i * 40 + 4000 * (i >= 25) for i in range(50)]
    path = write_movie(tmp_path / "a.ts", 50, pts=pts, **H264)
    assert numbers(path, [0.96, 3.0, 5.0, 5.96]) == [24, 24, 25, 49]


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
@pytest.mark.parametrize("mirror", [(False, False), (True, False), (False, True), (True, True)])
def test_decoder_shows_pictures_upright(rotation, mirror, tmp_path):
    """Every pixel lies where the display matrix sends it: x' = a x + c y, y' = b x + d y."""
    plain = write_movie(tmp_path / "plain.mp4", 3, **H264)
    path = write_movie(tmp_path / "a.mp4", 3, rotation=rotation, mirror=mirror, **H264)
    stored, upright = data.decode_clip(plain, [0.04])[0], data.decode_clip(path, [0.04])[0]
    with av.open(str(path)) as file:
        matrix = next(file.decode(video=0)).side_data.get("DISPLAYMATRIX")
    a, b, _, c, d = (
        (0x10000, 0, 0, 0, 0x10000) if matrix is None else np.frombuffer(matrix, "i4")[:5]
    )
    y, x = np.mgrid[: stored.shape[0], : stored.shape[1]]
    right, down = (a * x + c * y) // 0x10000, (b * x + d * y) // 0x10000
    expected = np.zeros((np.ptp(down) + 1, np.ptp(right) + 1, 3), np.uint8)
    expected[down - down.min(), right - right.min()] = stored
    assert np.array_equal(upright, expected)
    small = data.decode_clip(path, [0.04], short_side=32)
    assert small.shape[1:3] == ((48, 32) if rotation % 180 else (32, 48))


@pytest.mark.parametrize(
    "size, aspect, short_side, shape",
    [
        ((352, 288), Fraction(16, 11), 144, (144, 256)),  # PAL, wide
        ((352, 288), Fraction(16, 11), None, (288, 512)),
        ((720, 480), Fraction(8, 9), 240, (240, 320)),  # NTSC, 4:3
        ((96, 64), Fraction(1, 2), 32, (43, 32)),
        ((854, 480), Fraction(1280, 1281), None, (480, 854)),  # what rounding left
        ((96, 64), Fraction(1, 200), None, (64, 96)),  # a damaged header
    ],
)
def test_decoder_makes_pixels_square(size, aspect, short_side, shape, tmp_path):
    path = write_movie(tmp_path / "a.mp4", 2, size=size, aspect=aspect, **H264)
    assert data.decode_clip(path, [0], short_side=short_side).shape[1:3] == shape
    turned = write_movie(tmp_path / "b.mp4", 2, size=size, aspect=aspect, rotation=90, **H264)
    assert data.decode_clip(turned, [0], short_side=short_side).shape[2:0:-1] == shape


@pytest.mark.parametrize(
    "name",
    ["2024-05-01T10:00:00.mp4", "http:a.mp4", "file:x.mp4", "a%03d.mp4", "a b#?&.mp4", "-i.mp4"],
)
def test_decoder_takes_any_file_name(name, tmp_path, monkeypatch):
    movie = write_movie(tmp_path / "a.mp4", 3, **H264)
    shutil.copy(movie, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(data.decode_clip(name, [0])) == 1
    assert len(data.decode_clip(tmp_path / name, [0])) == 1
