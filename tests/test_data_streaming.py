"""Streams give the samples of random access; workers share them out; mixtures draw by weight times transitions."""

import sys

import av
import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from data_fixtures import DEMOS, RLDS, TASKS, copy_of

from vla_adapter_hf import VLAAdapterTrainingArguments
from vla_adapter_hf.data import (
    BadEpisodeError,
    ImageAugmentation,
    VLAAdapterDataset,
    VLAAdapterMixture,
    VLAAdapterStreamingDataset,
)
from vla_adapter_hf.data.lerobot.video import TorchcodecFile, VideoCache, VideoError, VideoFile, import_torchcodec


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        if name == "images":
            assert len(one[name]) == len(other[name])
            assert all(np.array_equal(a, b) for a, b in zip(one[name], other[name], strict=True))
        else:
            assert np.array_equal(one[name], other[name]), name


def assert_streams_the_same(stream, dataset):
    samples = list(stream)
    assert len(samples) == len(dataset) > 0
    for index, sample in enumerate(samples):
        assert_same(sample, dataset[index])


@pytest.mark.parametrize("name", ["lerobot_v30_image", "lerobot_v30_video", "lerobot_v21_video"])
@pytest.mark.parametrize("pad_chunks", [False, True])
def test_a_lerobot_stream_gives_the_samples_of_random_access(name, pad_chunks):
    arguments = {"path": DEMOS / name, "robot": "libero", "pad_chunks": pad_chunks, "chunk_size": 20}
    stream = VLAAdapterStreamingDataset.from_lerobot(**arguments)
    assert_streams_the_same(stream, VLAAdapterDataset.from_lerobot(**arguments))


def test_an_rlds_stream_gives_the_samples_of_random_access():
    stream = VLAAdapterStreamingDataset.from_rlds(RLDS, robot="libero")
    assert_streams_the_same(stream, VLAAdapterDataset.from_rlds(RLDS, robot="libero"))


def test_a_datasets_stream_gives_the_samples_of_random_access():
    path = str(DEMOS / "lerobot_v30_image" / "data" / "chunk-000" / "file-000.parquet")
    rows = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
    stream = VLAAdapterStreamingDataset.from_dataset(rows, robot="libero", instruction="go", unnorm_key="x")
    whole = VLAAdapterDataset.from_lerobot(
        DEMOS / "lerobot_v30_image", robot="libero", instruction="go", unnorm_key="x"
    )
    assert_streams_the_same(stream, whole)
    assert stream.norm_stats == whole.norm_stats  # computed in a pass of its own


def test_a_stream_has_the_statistics_of_the_dataset_or_those_given():
    stream = VLAAdapterStreamingDataset.from_lerobot(DEMOS / "lerobot_v21_video", robot="libero")
    whole = VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v21_video", robot="libero")
    assert stream.norm_stats == whole.norm_stats
    given = VLAAdapterStreamingDataset.from_lerobot(
        DEMOS / "lerobot_v21_video", robot="libero", unnorm_key="own", norm_stats={"own": {"action": {}}}
    )
    assert given.norm_stats == {"own": {"action": {}}}
    with pytest.raises(ValueError, match="norm_stats has other, expected 'own'"):
        VLAAdapterStreamingDataset.from_rlds(RLDS, robot="libero", unnorm_key="own", norm_stats={"other": {}})


def loader(dataset, workers, **options):
    """Samples as they are, through DataLoader workers."""
    if workers:
        options.setdefault("multiprocessing_context", "fork")
    return torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=None, **options)


def keys_of(samples):
    return [(sample["episode_index"], sample["frame_index"]) for sample in samples]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("name", ["lerobot_v30_image", "lerobot_v21_video"], ids=["one file", "a file per episode"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_a_stream_out_without_loss_or_repetition(name, workers):
    augmentation = ImageAugmentation(16, seed=2)
    stream = VLAAdapterStreamingDataset.from_lerobot(
        DEMOS / name, cameras=["image"], robot="libero", image_transform=augmentation
    )
    stream.set_epoch(5)
    samples = list(stream)
    alone = dict(zip(keys_of(samples), samples, strict=True))
    shared = list(loader(stream, workers))
    assert sorted(keys_of(shared)) == sorted(alone)
    for key, sample in zip(keys_of(shared), shared, strict=True):
        assert np.array_equal(sample["images"][0], alone[key]["images"][0])


def test_shuffling_changes_the_order_with_the_epoch_and_loses_nothing():
    def stream():
        return VLAAdapterStreamingDataset.from_rlds(RLDS, cameras=["image"], robot="libero", shuffle_buffer=20, seed=1)

    first = keys_of(stream())
    ordered = keys_of(VLAAdapterStreamingDataset.from_rlds(RLDS, cameras=["image"], robot="libero"))
    assert sorted(first) == ordered != first
    assert keys_of(stream()) == first
    later = stream()
    later.set_epoch(1)
    assert sorted(keys_of(later)) == ordered and keys_of(later) != first
    with pytest.raises(ValueError, match="shuffle_buffer=-1"):
        VLAAdapterStreamingDataset.from_rlds(RLDS, robot="libero", shuffle_buffer=-1)


@pytest.mark.parametrize("kind", ["data", "video", "short", "task"])
def test_bad_episodes_of_a_stream_are_named_or_skipped_and_counted(kind, tmp_path):
    from test_data_dataset import break_data_file, break_short, break_task, break_video

    folder = copy_of("lerobot_v21_video", tmp_path)
    {"data": break_data_file, "video": break_video, "short": break_short, "task": break_task}[kind](folder)
    with pytest.raises(BadEpisodeError, match="episode 1"):
        list(VLAAdapterStreamingDataset.from_lerobot(folder, robot="libero"))
    stream = VLAAdapterStreamingDataset.from_lerobot(folder, robot="libero", on_bad_episode="skip")
    assert sorted({key[0] for key in keys_of(stream)}) == [0, 2, 3]
    assert stream.num_skipped_episodes == 1


# Workers of a dataset with random access


@pytest.mark.parametrize(
    ("name", "context"),
    [("lerobot_v30_image", "fork"), ("lerobot_v30_image", "spawn"), ("lerobot_v30_video", "fork"),
     ("lerobot_v30_video", "spawn"), ("rlds", "fork"), ("rlds", "spawn")],
)  # fmt: skip
def test_samples_are_the_same_whatever_the_number_of_workers(name, context):
    make = VLAAdapterDataset.from_rlds if name == "rlds" else VLAAdapterDataset.from_lerobot
    dataset = make(DEMOS / name, robot="libero", image_transform=ImageAugmentation(32, seed=9))
    dataset.set_epoch(2)
    indices = np.random.default_rng(0).permutation(len(dataset))[:12].tolist()
    expected = [dataset[index] for index in indices]  # the parent has files open before it forks
    for workers in (0, 1, 2) if context == "fork" else (1,):
        options = {"multiprocessing_context": context} if workers else {}
        got = list(loader(dataset, workers, sampler=indices, **options))
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    assert_same(dataset[indices[0]], expected[0])  # and the parent's files still work


def test_a_new_epoch_reaches_workers_that_live_on():
    dataset = VLAAdapterDataset.from_lerobot(
        DEMOS / "lerobot_v30_image", cameras=["image"], robot="libero", image_transform=ImageAugmentation(16)
    )
    batches = loader(dataset, 2, sampler=[3, 4], persistent_workers=True)
    first = [sample["images"][0] for sample in batches]
    dataset.set_epoch(1)
    second = [sample["images"][0] for sample in batches]
    assert not any(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert np.array_equal(second[0], dataset[3]["images"][0])


# Video


def test_frames_of_a_video_are_the_same_in_any_order_and_files_stay_bounded():
    folder = DEMOS / "lerobot_v21_video" / "videos" / "chunk-000" / "observation.images.image"
    files = [folder / f"episode_{episode:06d}.mp4" for episode in range(4)]
    cache = VideoCache(max_open=2)
    in_order = [[cache.read(file, frame, 10) for frame in range(20)] for file in files]
    assert len(cache) == 2
    rng = np.random.default_rng(0)
    for _ in range(60):
        file, frame = rng.integers(4), rng.integers(20)
        assert np.array_equal(cache.read(files[file], int(frame), 10), in_order[file][frame])
    assert np.array_equal(cache.read(files[0], 5, 10), cache.read(files[0], 5, 10))
    # At 2 frames a second frame 3 is the one at 1.5 s, number 15 of a file with 10 a second.
    assert np.array_equal(cache.read(files[0], 3, 2), in_order[0][15])


def test_reading_frames_in_order_does_not_seek(monkeypatch):
    video = VideoFile(DEMOS / "lerobot_v30_video/videos/observation.images.image/chunk-000/file-000.mp4")
    decoded = []
    decode = video._decode_until
    monkeypatch.setattr(video, "_decode_until", lambda *a: decoded.append(video._frames) or decode(*a))
    for frame in range(30):
        video.read(frame, 10)
    assert len({id(frames) for frames in decoded[1:]}) == 1  # one pass over the file
    video.close()


@pytest.fixture
def torchcodec():
    try:
        return import_torchcodec()
    except ImportError as error:
        pytest.skip(str(error))


def h264_video(path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "12", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("codec", ["av1", "h264"])
def test_torchcodec_gives_the_frames_of_pyav_in_any_order(codec, tmp_path, torchcodec):
    path = DEMOS / "lerobot_v30_video/videos/observation.images.image/chunk-000/file-000.mp4"
    if codec == "h264":
        path = tmp_path / "h264.mp4"
        h264_video(path, np.random.default_rng(0).integers(0, 256, (40, 96, 130, 3), np.uint8))
    expected, got = VideoFile(path), TorchcodecFile(path)
    order = [*range(40), *np.random.default_rng(1).permutation(40).tolist()]
    for fps, frames in ((10, order), (5, range(20))):
        for frame in frames:
            assert np.array_equal(got.read(frame, fps), expected.read(frame, fps)), (fps, frame)
    with pytest.raises(VideoError, match=r"has no frame 1000 \(at 100\.000 s\)"):
        got.read(1000, 10)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"broken\.mp4 cannot be opened"):
        TorchcodecFile(broken)


def test_a_dataset_read_with_torchcodec_has_the_same_samples_also_in_workers(torchcodec):
    plain, fast = (
        VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v30_video", robot="libero", video_backend=backend)
        for backend in ("pyav", "torchcodec")
    )
    indices = [30, 3, 90]
    for index, sample in zip(indices, loader(fast, 1, sampler=indices), strict=True):
        assert_same(sample, plain[index])


def test_a_video_backend_that_is_missing_or_unknown_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    dataset = VLAAdapterDataset.from_lerobot(
        DEMOS / "lerobot_v30_video", robot="libero", video_backend="torchcodec", on_bad_episode="error"
    )
    with pytest.raises(ImportError, match=r"needs torchcodec.*pip install 'vla-adapter-hf\[torchcodec\]'.*PyAV"):
        dataset[0]
    with pytest.raises(ValueError, match="video_backend='opencv' is not known; use one of pyav, torchcodec"):
        VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v30_video", robot="libero", video_backend="opencv")


# Mixtures


def two_datasets(**options):
    rlds = VLAAdapterDataset.from_rlds(RLDS, robot="libero", unnorm_key="a", **options)
    lerobot = VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v21_video", robot="libero", unnorm_key="b", **options)
    return rlds, lerobot  # 111 and 226 transitions


def test_datasets_are_drawn_by_weight_times_transitions():
    mixture = VLAAdapterMixture(two_datasets(), weights=[2.0, 0.5], num_samples=20_000)
    expected = 2.0 * 111 / (2.0 * 111 + 0.5 * 226)
    assert mixture.probabilities[0] == pytest.approx(expected)
    share = np.mean([mixture.datasets[number].unnorm_key == "a" for number in mixture._planned()[0]])
    assert share == pytest.approx(expected, abs=0.015)
    assert mixture[0]["unnorm_key"] in ("a", "b")


def test_a_mixture_keeps_each_datasets_statistics_and_samples():
    datasets_ = two_datasets()
    mixture = VLAAdapterMixture(datasets_)
    assert set(mixture.norm_stats) == {"a", "b"}
    assert mixture.norm_stats["b"] == datasets_[1].norm_stats["b"]
    assert len(mixture) == len(datasets_[0]) + len(datasets_[1])
    chosen, samples = mixture._planned()
    for index in (0, 7, len(mixture) - 1):
        assert_same(mixture[index], datasets_[chosen[index]][int(samples[index])])
    assert_same(mixture[-1], mixture[len(mixture) - 1])
    with pytest.raises(IndexError):
        mixture[len(mixture)]


def test_nothing_is_drawn_twice_before_everything_was_drawn_once():
    mixture = VLAAdapterMixture(two_datasets(), num_samples=1000)
    chosen, samples = mixture._planned()
    for number, dataset in enumerate(mixture.datasets):
        drawn = samples[chosen == number]
        counts = np.bincount(drawn, minlength=len(dataset))
        assert counts.max() - counts.min() <= 1


def test_a_mixtures_draws_follow_seed_and_epoch_alone():
    one, other = VLAAdapterMixture(two_datasets(), seed=4), VLAAdapterMixture(two_datasets(), seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(one._planned(), other._planned(), strict=True))
    first = one._planned()[1].copy()
    one.set_epoch(1)
    assert not np.array_equal(one._planned()[1], first)
    assert one.datasets[0].epoch == 1
    assert not np.array_equal(VLAAdapterMixture(two_datasets(), seed=5)._planned()[1], first)


def test_a_sample_drawn_twice_in_an_epoch_is_augmented_differently():
    small = VLAAdapterDataset.from_lerobot(
        DEMOS / "lerobot_v30_image", cameras=["image"], robot="libero", image_transform=ImageAugmentation(16)
    )
    mixture = VLAAdapterMixture([small], num_samples=2 * len(small))
    _, samples = mixture._planned()
    again = [index for index in range(len(small), len(mixture)) if samples[index] == samples[0]][0]
    assert np.array_equal(mixture[0]["actions"], mixture[again]["actions"])
    assert not np.array_equal(mixture[0]["images"][0], mixture[again]["images"][0])


def test_datasets_that_do_not_fit_together_are_refused():
    rlds, lerobot = two_datasets()
    with pytest.raises(ValueError, match="1 weights for 2 datasets"):
        VLAAdapterMixture([rlds, lerobot], weights=[1])
    with pytest.raises(ValueError, match="weights=\\[0.0, -1.0\\]"):
        VLAAdapterMixture([rlds, lerobot], weights=[0, -1])
    with pytest.raises(ValueError, match=r"\['a', 'a'\] are not distinct"):
        VLAAdapterMixture([rlds, rlds])
    other = VLAAdapterDataset.from_rlds(RLDS, robot="libero", unnorm_key="c", chunk_size=4)
    with pytest.raises(ValueError, match="differ in chunk_size \\(b: 8, c: 4\\)"):
        VLAAdapterMixture([lerobot, other])
    one_camera = VLAAdapterDataset.from_rlds(RLDS, cameras=["image"], robot="libero", unnorm_key="c")
    with pytest.raises(ValueError, match="differ in number of cameras"):
        VLAAdapterMixture([lerobot, one_camera])
    with pytest.raises(ValueError, match="a mixture of no datasets"):
        VLAAdapterMixture([])


def frame_numbers(samples) -> torch.Tensor:
    return torch.tensor([sample["frame_index"] for sample in samples])


def test_processes_take_turns_with_the_batches_of_a_stream_whatever_their_shapes(tmp_path):
    """Prompts are padded batch by batch; batches of several lengths cannot be joined and dispatched."""
    arguments = VLAAdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert arguments.accelerator_config.dispatch_batches is False
    frames = []
    for process in range(2):
        stream = VLAAdapterStreamingDataset.from_lerobot(DEMOS / "lerobot_v30_image", cameras=["image"])
        loader = torch.utils.data.DataLoader(stream, 4, collate_fn=frame_numbers)
        of_process = prepare_data_loader(
            loader,
            num_processes=2,
            process_index=process,
            put_on_device=False,
            dispatch_batches=arguments.accelerator_config.dispatch_batches,
        )
        frames.append(next(iter(of_process)).tolist())
    assert frames == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_texts_of_a_stream_are_the_instructions():
    stream = VLAAdapterStreamingDataset.from_lerobot(DEMOS / "lerobot_v21_video", cameras=["image"], robot="libero")
    assert list(dict.fromkeys(sample["text"] for sample in stream)) == TASKS
