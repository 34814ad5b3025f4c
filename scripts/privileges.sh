#!/usr/bin/env bash
# Says everything that this machine lacks for the tests, at once.
set -u
missing=()
if [ "$(id -u)" != 0 ] && ! sudo -n true 2>/dev/null; then missing+=("root, or sudo without a password: the tests load and attach the kernel program"); fi
[ -r /sys/kernel/btf/vmlinux ] || missing+=("BTF (/sys/kernel/btf/vmlinux): a kernel with CONFIG_DEBUG_INFO_BTF")
grep -q 'cgroup2' /proc/filesystems || missing+=("cgroup2 in the kernel")
grep -q 'bpf' /proc/filesystems || missing+=("bpffs in the kernel")
awk '$3 == "cgroup2" { found = 1 } END { exit !found }' /proc/mounts || missing+=("a mounted cgroup2 tree")
if [ ${#missing[@]} -gt 0 ]; then
    printf 'these tests cannot run here; missing:\n' >&2
    printf '  - %s\n' "${missing[@]}" >&2
    exit 1
fi
