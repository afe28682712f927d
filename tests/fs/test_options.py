"""The grammar of -o: what is honoured, ignored, refused, and what libfuse is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs.errors import UserError
from fs.front import options as grammar


def parse(*words: str) -> grammar.MountOptions:
    return grammar.parse(words)


def test_defaults_are_those_of_the_manual() -> None:
    options = parse()
    assert options.memory_bytes == 256 << 20
    assert options.cache == "none"
    assert options.atime == "relatime"
    assert options.fuse_type == "fuse.nofailfs"
    assert not options.read_only


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("64M", 64 << 20),
        ("64MiB", 64 << 20),
        ("64mb", 64 << 20),
        ("4g", 4 << 30),
        ("1T", 1 << 40),
        ("8k", 8 << 10),
        ("512b", 512),
        ("512B", 512),
    ],
)
def test_sizes_as_xfsprogs_writes_them(text: str, size: int) -> None:
    assert grammar.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "4x", "-1", "1.5G", "0x10", "4 GB x", "k4", "4bb"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="is not a size"):
        grammar.parse_size(text)


def test_later_words_win() -> None:
    assert not parse("ro,rw").read_only
    assert parse("rw", "ro").read_only
    assert parse("noatime,strictatime").atime == "strictatime"
    assert parse("cache=none", "cache=writeback").cache == "writeback"


@pytest.mark.parametrize(
    "words",
    [
        "defaults,_netdev,nofail,auto,noauto,user,users,nouser,rw",
        "x-systemd.automount,x-gvfs-name=disk,comment=hello,user=joe",
        "inode64,attr2,noquota,logbufs=8,default_permissions",
    ],
)
def test_ignored_words_change_nothing(words: str) -> None:
    assert parse(words) == parse()


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("zork", "zork"),
        ("zork=1", "zork"),
        ("ro=1", "ro"),
        ("memory", "memory"),
        ("max_read=4096", "max_read"),
        ("defaults=1", "defaults"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(word: str, name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}'") as refused:
        parse(f"rw,{word}")
    assert refused.value.exit_code == 1


@pytest.mark.parametrize(
    "word",
    [
        *("memory=1M", "cache=all", "lock_timeout=soon", "debug=maybe", "lanes=17", "lanes=-1"),
        *("lanes=many", "max_write=64K", "max_write=8M", "max_write=300K", "max_write=1MM"),
        *("stall=0", "stall=long"),
        *("transport=", "transport=pigeon"),
        *("latency=0", "latency=fast"),
        *("policy=", "policy=bsd", "policy=inject", "policy=inject:p=2", "policy=linux:p=1"),
        *("device=", "device=fast", "device=bw=fast", "device=bw=1M\\,bw=2M", "device=lat=2"),
        *("direct=", "direct=yes"),
        *("procdir=", "procdir=.", "procdir=..", "procdir=a/b", "procdir=" + "x" * 256),
    ],
)
def test_values_are_checked(word: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(word)
    assert refused.value.exit_code == 1


def test_a_model_of_a_device() -> None:
    chosen = parse("device=bw=50M\\,lat=2ms,ro")
    assert chosen.device == "bw=50M,lat=2ms"
    assert "device=bw=50M,lat=2ms" in grammar.describe(chosen)


def test_lanes_and_writes() -> None:
    assert parse().lanes == -1
    assert parse("lanes=0").lanes == 0
    assert parse("lanes=16,max_write=4M").max_write == 4 << 20
    assert parse("transport=uring").transport == "uring"


def test_policies() -> None:
    assert parse().policy == "irix"
    assert "policy" not in grammar.describe(parse())
    assert "policy=mayfail" in grammar.describe(parse("policy=mayfail"))
    chosen = parse(f"policy={grammar.escape('inject:p=0.5,seed=7,site=folio')},ro")
    assert chosen.policy == "inject:p=0.5,seed=7,site=folio"
    assert chosen.read_only


def test_who_writes_recovers_the_log() -> None:
    assert grammar.resolve(parse("norecovery,ro"), "/tmp/a", "/mnt").norecovery
    assert "norecovery=True" in grammar.describe(parse("norecovery,ro"))
    with pytest.raises(UserError, match="needs ro"):
        grammar.resolve(parse("norecovery"), "/tmp/a", "/mnt")


def test_direct_transfers() -> None:
    assert parse().direct == "auto"
    assert [parse(f"direct={mode}").direct for mode in ("auto", "on", "off")] == [
        *("auto", "on", "off")
    ]
    assert "direct=off" in grammar.describe(parse("direct=off"))
    with pytest.raises(UserError, match="direct=on"):
        grammar.resolve(parse("direct=on,scratch=1G"), "", "/mnt")


def test_latency() -> None:
    assert parse().latency == "auto"
    assert [parse(f"latency={mode}").latency for mode in ("auto", "on", "off")] == [
        *("auto", "on", "off")
    ]
    assert "latency=off" in grammar.describe(parse("latency=off"))


def test_the_directory_of_reports() -> None:
    assert parse().procdir == ".nofail"
    assert parse("procdir=off").procdir == ""
    assert parse("procdir=" + "x" * 255).procdir == "x" * 255
    assert "procdir=stats" in grammar.describe(parse("procdir=stats"))


def test_a_remount_gets_back_what_the_mount_table_shows() -> None:
    shown = "rw,nosuid,nodev,relatime,user_id=0,group_id=0,default_permissions,max_read=131072"
    options = parse(f"{shown},remount,ro")
    assert options.remount
    assert options.read_only
    with pytest.raises(UserError, match="user_id"):
        parse(shown)


def test_allow_other_and_allow_root_exclude_each_other() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        parse("allow_other", "allow_root")


def test_debug_stays_in_the_foreground() -> None:
    assert parse("debug").foreground
    assert parse("debug=1").foreground
    assert not parse("debug=0").foreground


def test_a_label_is_the_source_and_image_names_the_file() -> None:
    options = grammar.resolve(parse("image=/tmp/a,subtype="), "LABEL", "/mnt")
    assert options.image == "/tmp/a"
    assert options.mount_source == "LABEL"
    assert options.fuse_type == "fuse"
    assert "fsname=LABEL" in grammar.fuse_words(options)
    assert not [word for word in grammar.fuse_words(options) if word.startswith("subtype")]


def test_what_libfuse_is_told() -> None:
    options = grammar.resolve(parse("ro,suid,nodev,noatime,allow_other"), "/tmp/a", "/mnt")
    words = grammar.fuse_words(options)
    assert words[0] == "default_permissions"
    assert {"ro", "suid", "nodev", "noatime", "allow_other", "subtype=nofailfs"} <= set(words)
    assert not {"rw", "nosuid", "dev", "memory"} & set(words)


@pytest.mark.parametrize(
    ("words", "source", "mountpoint", "message"),
    [
        ("", "", "/mnt", "no image"),
        ("", "a", "", "no mount point"),
        ("scratch=1G,ro", "", "/mnt", "drop ro"),
        ("scratch=1G,image=/a", "", "/mnt", "exclude each other"),
    ],
)
def test_incomplete_or_contradictory(
    words: str, source: str, mountpoint: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        grammar.resolve(parse(words), source, mountpoint)


def test_scratch_needs_no_source() -> None:
    assert grammar.resolve(parse("scratch=1G"), "", "/mnt").mount_source == "scratch"


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=("Cs",))))
def test_any_value_survives_escaping(value: str) -> None:
    words = grammar.split_words(f"ro,fsname={grammar.escape(value)},rw")
    assert words == ["ro", f"fsname={value}", "rw"]


def test_a_description_names_the_cache_mode() -> None:
    assert grammar.describe(parse("cache=writeback,ro")).startswith(
        "ro,memory=256M,cache=writeback"
    )
