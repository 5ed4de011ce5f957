"""Clocks and the stopwatch, with a fake for every device call."""

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, DynamicCache, EncoderDecoderCache

from layershed.devices import EventClock, WallClock, clock_for
from layershed.errors import MeasurementError
from layershed.performance.stopwatch import SpeedSettings, Stopwatch, cache_bytes, describe_device
from layershed.spellings import cache_in, cache_name
from tests.support.models import SIZES, build_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def log():
    return []


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "xpu", "mps"])
def test_wall_clock_is_read_after_device_synchronisation(monkeypatch, log, device):
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
def test_event_clock_waits_only_when_seconds_are_read(log):
    clock = EventClock(CUDA)
    first, second, third = clock.mark(), clock.mark(), clock.mark()
    assert log == [("record", "stream of cuda:1")] * 3
    assert clock.seconds(first, third) == 2.0  # elapsed_time is in milliseconds
    assert log[3:] == [("synchronize", 2000.0), ("elapsed", 0.0, 2000.0)]
    assert clock.seconds(second, third) == 1.0


@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", WallClock), ("mps", WallClock), ("xpu", EventClock), ("cuda", EventClock)]
)
def test_clock_for_returns_the_clock_of_each_device(device, kind):
    clock = clock_for(torch.device(device))
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
    ids=["prompt", "new tokens", "batch size", "runs", "warm-up", "positions"],
)
def test_speed_settings_refuse_invalid_numbers(llama, settings, message):
    with pytest.raises(MeasurementError, match=message):
        SpeedSettings(**settings).check(llama)


def test_speed_settings_accept_tokens_that_fit(llama):
    assert SpeedSettings(100, 28, warmup=0).check(llama) is llama
    bloom = build_model("bloom")
    del bloom.config.max_position_embeddings  # BLOOM does not use it, and real configs lack it
    assert SpeedSettings(5000, 5000).check(bloom) is bloom


def test_speed_settings_accept_only_causal_language_models(llama):
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
def test_stopwatch_run_takes_four_marks_and_measures_the_cache(llama):
    """Two marks per phase, as the queue must be empty before decoding begins."""
    stopwatch = Stopwatch(llama, SpeedSettings(prompt_tokens=6, new_tokens=3, batch_size=2), Ticks())
    timing = stopwatch.run()
    assert stopwatch.clock.now == 4
    assert (timing.prefill, timing.decode) == (1.0, 1 / 3)
    assert timing.kv_bytes == 4 * 2 * 9 * (2 * 2 * 8) * 4  # blocks, sequences, tokens, keys and values, float32


@torch.no_grad()
def test_stopwatch_runs_use_one_prompt_and_keep_the_random_state(llama):
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
def test_stopwatch_computes_only_the_last_logits_if_supported(llama, monkeypatch, last_only):
    whole = llama.forward

    name = cache_name(whole)

    def forward(input_ids, past_key_values=None, use_cache=None):
        return whole(input_ids=input_ids, use_cache=use_cache, **{name: past_key_values})

    if not last_only:
        monkeypatch.setattr(llama, "forward", forward)
    stopwatch = Stopwatch(llama, SpeedSettings(prompt_tokens=6, new_tokens=2))
    output = stopwatch.prefill()
    assert output.logits.shape[1] == (1 if last_only else 6)
    assert cache_in(stopwatch.decode(output)).get_seq_length() == 8


def test_cache_bytes_count_shared_memory_once():
    cache = DynamicCache()
    keys = torch.zeros(1, 2, 10, 8)
    cache.update(keys, torch.zeros(1, 2, 10, 8), 0)
    alone = cache_bytes(cache)
    cache.update(keys, keys, 1)
    cache.layers[1].keys, cache.layers[1].values = cache.layers[0].keys, cache.layers[0].values[:, :, :3]
    assert cache_bytes(cache) == alone == 2 * 2 * 10 * 8 * 4


def test_cache_bytes_of_a_decoder_cover_self_attention_only():
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    cache.self_attention_cache.update(torch.zeros(1, 2, 10, 8), torch.zeros(1, 2, 10, 8), 0)
    assert cache_bytes(cache) == 2 * 2 * 10 * 8 * 4


def test_describe_device_names_gpu_or_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert describe_device(CPU) == f"cpu ({torch.get_num_threads()} threads)"
    assert describe_device(CUDA) == "GPU 1"
