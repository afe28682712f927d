"""What stands between the filesystem and its device: experiments, one around the other.

From the device outwards: what records writes, what fails, what takes its time. So the record has
what reached the device, and a request that fails has taken its time.
"""

from __future__ import annotations

from collections.abc import Iterator

from fs.device import faulty, model
from fs.device.base import Device
from fs.device.faulty import Faulty
from fs.device.image import ImageFile
from fs.device.modeled import Modeled
from fs.device.recorder import Recorder
from fs.device.sizes import Sizes


def build(device: Device, modeled: str, faults: str, record: str) -> Device:
    """The device, in what mount options ask for. OSError if the record cannot be made."""
    if record:
        device = Recorder(device, record)
    if faults:
        device = Faulty(device, faulty.parse(faults))
    if modeled:
        device = Modeled(device, model.parse(modeled))
    return device


def layers(device: Device) -> Iterator[Device]:
    """A device and all that it stands around, from the outside."""
    while device is not None:
        yield device
        device = getattr(device, "inner", None)  # type: ignore[assignment]


def sizes(device: Device) -> Sizes:
    """What has reached the image at the inside."""
    return next(layer.sizes for layer in layers(device) if isinstance(layer, ImageFile))
