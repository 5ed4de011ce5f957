"""The simulated device as an accelerator of Lightning."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.support.simulated.tensors import SIM


class SimulatedAccelerator(Accelerator):
    """One device, sim:0."""

    def setup_device(self, device):
        assert device.type == SIM

    def teardown(self):
        pass

    def get_device_stats(self, device):
        return {}

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(SIM, 0)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return SIM


def make_trainer(folder, *callbacks, device=SIM, **kwargs):
    """A quiet trainer on the simulated device or on the CPU."""
    settings = {"max_steps": 8, "enable_checkpointing": False, "num_sanity_val_steps": 0, "log_every_n_steps": 4}
    where = {"accelerator": "cpu"}
    if device == SIM:
        where = {"strategy": SingleDeviceStrategy(torch.device(SIM, 0), accelerator=SimulatedAccelerator())}
    return pl.Trainer(
        **where,
        logger=CSVLogger(folder, name="", version=""),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{**settings, **kwargs},
    )
