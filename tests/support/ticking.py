"""A clock that moves only when sublayers run, so that every speedup of a run can be worked out by hand."""

from dataclasses import dataclass

from layershed.performance.roofline import Ceilings

MADE_UP = Ceilings("a machine", 1e12, 1e11, "made up")
REST = 8.0  # seconds that everything but the sublayers takes in a pass


def attentions_take_more(block, kind):
    """Seconds of a sublayer in a one-token pass: powers of two, so that sums are exact."""
    return (4.0 if kind == "attention" else 1.0) * (1 + block % 2)


def mlps_take_more(block, kind):
    """The other way round."""
    return (4.0 if kind == "mlp" else 1.0) * (1 + block % 2)


@dataclass
class Ticking:
    """A clock that takes so many seconds per one-token pass of each sublayer, and others per pass over a prompt.

    Args:
        decode: (block, kind) -> seconds of a one-token pass.
        prefill: (block, kind) -> seconds of a pass over more tokens.
        rest: Seconds of everything else in a pass.
    """

    decode: object = attentions_take_more
    prefill: object = mlps_take_more
    rest: float = REST
    now: float = 0.0
    marks: int = 0
    tokens: int = 0

    def watch(self, llama):
        """Have the sublayers of a Llama move this clock, whenever they really run."""
        llama.model.embed_tokens.register_forward_pre_hook(self._begin)
        for block, layer in enumerate(llama.model.layers):
            layer.self_attn.o_proj.register_forward_pre_hook(self._run(block, "attention"))
            layer.mlp.down_proj.register_forward_pre_hook(self._run(block, "mlp"))

    def mark(self):
        self.marks += 1
        return self.now

    def seconds(self, start, end):
        return end - start

    def speedup(self, dropped, blocks=4, phase="decode"):
        """By hand: all seconds over those that are left."""
        cost = getattr(self, phase)
        every = [(block, kind) for block in range(blocks) for kind in ("attention", "mlp")]
        total = self.rest + sum(cost(*key) for key in every)
        return total / (total - sum(cost(*key) for key in dropped))

    def _begin(self, _module, args):
        self.tokens = args[0].shape[1]
        self.now += self.rest

    def _run(self, block, kind):
        def hook(*_):
            self.now += (self.decode if self.tokens == 1 else self.prefill)(block, kind)

        return hook


def install(monkeypatch, clock):
    """Every measurement goes by this clock, and none asks the machine for its ceilings."""
    monkeypatch.setattr("layershed.performance.stopwatch.clock_for", lambda _device: clock)
    for module in ("speed", "speedup_target"):
        monkeypatch.setattr(f"layershed.performance.{module}.measure_ceilings", lambda *_: MADE_UP)
    return clock
