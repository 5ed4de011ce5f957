"""Clocks and the stopwatch, on fakes of every device call."""

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, DynamicCache, EncoderDecoderCache

from layershed.errors import MeasurementError
from layershed.performance.stopwatch import (
    EventClock,
    SpeedSettings,
    Stopwatch,
    WallClock,
    cache_bytes,
    clock_of,
    describe_device,
)
from tests.support.models import SIZES, build_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def log():
    return []


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "xpu", "mps"])
def test_the_wall_clock_is_read_once_the_device_is_done(monkeypatch, log, device):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda waited: log.append(str(waited)))

    def now():
        log.append("now")
        return 7.0

    clock = WallClock(torch.device(device), now)
    assert clock.mark() == 7.0
    assert log == (["now"] if device == "cpu" else [device, "now"])
    assert clock.seconds(2.0, 4.5) == 2.5
    assert len(log) <= 2


@pytest.fixture
def cuda(monkeypatch, log):
    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing
            self.at = None

        def record(self, stream):
            self.at = 1000.0 * sum(entry[0] == "record" for entry in log)
            log.append(("record", stream))

        def synchronize(self):
            log.append(("synchronize", self.at))

        def elapsed_time(self, end):
            log.append(("elapsed", self.at, end.at))
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")


@pytest.mark.usefixtures("cuda")
def test_events_are_recorded_in_the_stream_and_waited_for_only_when_asked(log):
    clock = EventClock(CUDA)
    first, second, third = clock.mark(), clock.mark(), clock.mark()
    assert log == [("record", "stream of cuda:1")] * 3
    assert clock.seconds(first, third) == 2.0  # elapsed_time tells milliseconds
    assert log[3:] == [("synchronize", 2000.0), ("elapsed", 0.0, 2000.0)]
    assert clock.seconds(second, third) == 1.0


@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", WallClock), ("mps", WallClock), ("xpu", WallClock), ("cuda", EventClock)]
)
def test_every_device_has_its_clock(device, kind):
    clock = clock_of(torch.device(device))
    assert type(clock) is kind
    assert clock.device == torch.device(device)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens=0: it must be at least 1"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"runs": 0}, "runs=0"),
        ({"warmup": -1}, "warmup=-1: it must be at least 0"),
        ({"prompt_tokens": 100, "new_tokens": 29}, "prompt_tokens=100 and new_tokens=29 .* 128 positions"),
    ],
)
def test_numbers_that_cannot_be_measured_are_refused(llama, settings, message):
    with pytest.raises(MeasurementError, match=message):
        SpeedSettings(**settings).check(llama)


def test_what_fits_is_accepted(llama):
    assert SpeedSettings(100, 28, warmup=0).check(llama) is llama
    bloom = build_model("bloom")
    del bloom.config.max_position_embeddings  # which it has no use for, and a real one does not say
    assert SpeedSettings(5000, 5000).check(bloom) is bloom


def test_only_a_causal_language_model_is_accepted(llama):
    encoder = AutoModelForMaskedLM.from_config(build_model("bert").config.__class__(**SIZES))
    for model in (encoder, AutoModel.from_config(llama.config), torch.nn.Linear(1, 1)):
        with pytest.raises(MeasurementError, match=f"{type(model).__name__} does not predict the next token"):
            SpeedSettings().check(model)


class Ticks:
    """A clock of one second per mark."""

    def __init__(self):
        self.now = 0

    def mark(self):
        self.now += 1
        return self.now

    def seconds(self, start, end):
        return float(end - start) / start


@torch.no_grad()
def test_a_run_is_timed_by_four_marks_and_its_cache_weighed(llama):
    """Two of each phase: a queue must be empty of the prefill before decoding begins."""
    stopwatch = Stopwatch(llama, SpeedSettings(prompt_tokens=6, new_tokens=3, batch_size=2), Ticks())
    timing = stopwatch.run()
    assert stopwatch.clock.now == 4
    assert (timing.prefill, timing.decode) == (1.0, 1 / 3)
    assert timing.kv_bytes == 4 * 2 * 9 * (2 * 2 * 8) * 4  # blocks, sequences, tokens, keys and values, float32


@torch.no_grad()
def test_every_run_reads_the_same_prompt_and_moves_no_random_state(llama):
    before = torch.get_rng_state()
    settings = SpeedSettings(prompt_tokens=50, batch_size=2)
    prompts = [Stopwatch(llama, settings).prompt for _ in range(2)]
    assert torch.equal(*prompts)
    assert prompts[0].shape == (2, 50)
    assert 0 <= prompts[0].min() < prompts[0].max() < 97
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(Stopwatch(llama, settings).clock, WallClock)


@pytest.mark.parametrize("last_only", [True, False])
@torch.no_grad()
def test_logits_are_made_for_the_last_position_alone_where_the_model_can(llama, monkeypatch, last_only):
    whole = llama.forward

    def forward(input_ids, past_key_values=None, use_cache=None):
        return whole(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    if not last_only:
        monkeypatch.setattr(llama, "forward", forward)
    stopwatch = Stopwatch(llama, SpeedSettings(prompt_tokens=6, new_tokens=2))
    output = stopwatch.prefill()
    assert output.logits.shape[1] == (1 if last_only else 6)
    assert stopwatch.decode(output).past_key_values.get_seq_length() == 8


def test_memory_that_tensors_of_a_cache_share_counts_once():
    cache = DynamicCache()
    keys = torch.zeros(1, 2, 10, 8)
    cache.update(keys, torch.zeros(1, 2, 10, 8), 0)
    alone = cache_bytes(cache)
    cache.update(keys, keys, 1)
    cache.layers[1].keys, cache.layers[1].values = cache.layers[0].keys, cache.layers[0].values[:, :, :3]
    assert cache_bytes(cache) == alone == 2 * 2 * 10 * 8 * 4


def test_the_cache_of_a_decoder_that_could_have_an_encoder_is_that_of_its_own_tokens():
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    cache.self_attention_cache.update(torch.zeros(1, 2, 10, 8), torch.zeros(1, 2, 10, 8), 0)
    assert cache_bytes(cache) == 2 * 2 * 10 * 8 * 4


def test_a_device_is_described(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert describe_device(CPU) == f"cpu ({torch.get_num_threads()} threads)"
    assert describe_device(CUDA) == "GPU 1"
