"""Mounts, devices and read modes, from made-up kernel files and from real folders."""

import os
from pathlib import Path

import pytest

from tiered.errors import ReadError
from tiered.io import ReadMode
from tiered.io.filesystem import free_nbytes, mount_of, probe_folder, queue_of

MOUNTS = r"""22 27 0:21 / / rw,relatime - ext4 /dev/vda rw,discard
23 22 0:22 / /mnt rw - xfs /dev/vdb rw
24 22 0:23 / /mnt/a\040b ro,nosuid shared:1 master:2 - tmpfs my\040tmp rw,size=4k
25 22 0:24 / /mnt rw - btrfs /dev/vdc rw
"""


def test_the_innermost_and_latest_mount_counts(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(MOUNTS)
    assert mount_of(Path("/"), tmp_path).kind == "ext4"
    assert mount_of(Path("/mnt/x"), tmp_path).source == "/dev/vdc"
    blank = mount_of(Path("/mnt/a b/c"), tmp_path)
    assert (blank.kind, blank.source, blank.options) == ("tmpfs", "my tmp", "ro,nosuid,rw,size=4k")
    assert mount_of(Path("/mntx"), tmp_path).kind == "ext4"


def test_the_queue_of_a_partition_is_its_disks(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    disk = tmp_path / "devices/nvme0n1"
    (disk / "queue").mkdir(parents=True)
    (disk / "nvme0n1p1").mkdir()
    settings = {"rotational": "0", "read_ahead_kb": "128", "scheduler": "[none] mq-deadline", "nr_requests": "1023"}
    for name, value in settings.items():
        (disk / "queue" / name).write_text(value + "\n")
    links = tmp_path / "dev/block"
    links.mkdir(parents=True)
    (links / f"{os.major(device)}:{os.minor(device)}").symlink_to(disk / "nvme0n1p1")
    queue = queue_of(tmp_path, tmp_path)
    assert (queue.device, queue.rotational, queue.read_ahead_nbytes) == ("nvme0n1", False, 128 << 10)
    assert (queue.scheduler, queue.requests, queue.max_request_nbytes) == ("none", 1023, None)


def test_without_a_block_device_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="is no block device"):
        queue_of(tmp_path, tmp_path)


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    assert probe_folder(tmp_path).mode in ReadMode
    assert list(tmp_path.iterdir()) == []
    assert free_nbytes(tmp_path) > 0


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="no temporary file can be written"):
        probe_folder(tmp_path / "missing")
