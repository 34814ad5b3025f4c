#!/usr/bin/env bash
# Runs suites that meet the kernel on Debian's 6.1 under an emulated processor: an older kernel, a pure cgroup v2 tree.
#   scripts/kernel-6.1.sh [SUITE[:FILTER]...]
# An emulated timer is late on a busy machine; no_timer_check lets the kernel boot there.
# Suites with a whole gate want an optimised one (GATE=target/.../release/latchgate): an unoptimised one is too slow there
# to be ready in time.
# Wants qemu-system-x86_64, apt and dpkg; what it downloads is kept in $CACHE/kernel-6.1. Exit code 0 when every suite passed.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${CACHE:-$HOME/.cache/latchgate}/kernel-6.1
suites=("$@")
if [ ${#suites[@]} = 0 ]; then suites=(kernel); fi
memory=${MEMORY:-3072} patience=${PATIENCE:-3000}

for program in qemu-system-x86_64 apt-get dpkg; do
    command -v "$program" >/dev/null || { echo "$program is not installed: apt-get install qemu-system-x86 apt dpkg" >&2; exit 2; }
done

mkdir -p "$cache/packages"
if [ ! -e "$cache/done" ]; then
    image=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-6\.1\..*-cloud-amd64\).*/\1/p' | head -1)
    [ -n "$image" ] || { echo "no package linux-image-6.1.*-cloud-amd64: Debian 12 has it" >&2; exit 2; }
    # What an action sees and runs: programs of Debian, not of this machine.
    (cd "$cache/packages" && apt-get download "$image" busybox-static)
    for package in "$cache"/packages/*.deb; do dpkg -x "$package" "$cache/files"; done
    touch "$cache/done"
fi
kernel=$(ls "$cache"/files/boot/vmlinuz-6.1.* | tail -1)

# Suites that do not exist yet in a tree are left out, by name.
known=()
for suite in "${suites[@]}"; do
    name=${suite%%:*}
    if [ -e "tests/tests/$name.rs" ] || [ -e "tests/tests/$name/main.rs" ]; then known+=("$suite"); else echo "no suite $name in this tree"; fi
done
cargo build --quiet --package latchgate
tests=()
for suite in "${known[@]}"; do tests+=(--test "${suite%%:*}"); done
target=$(rustc -vV | sed -n 's/^host: //p')
built=$(cargo test --package latchgate-tests --no-run "${tests[@]}" 2>&1 | sed -n 's/^ *Executable .*(\(.*\))$/\1/p')

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root"/{bin,sbin,proc,sys,dev,tmp,run,etc/ssl/certs,var/lib,root,lg/deps,usr/bin,usr/lib,usr/sbin}
for link in lib lib64; do [ -L "/$link" ] && cp -a "/$link" "$root/$link"; done
rm -rf "$root/bin" "$root/sbin"; ln -s usr/bin "$root/bin"; ln -s usr/sbin "$root/sbin"

# A program and the libraries that it asks for, at their own paths.
put() {
    local file real
    for file in "$@"; do
        [ -e "$file" ] || { echo "$file is not here: tests that want it will say so"; continue; }
        real=$(realpath "$file")
        mkdir -p "$root$(dirname "$file")" "$root$(dirname "$real")"
        cp -an "$real" "$root$real"
        [ "$file" = "$real" ] || ln -sfn "$real" "$root/usr/bin/$(basename "$file")"
        { ldd "$real" 2>/dev/null || true; } | sed -n 's/^[^/]*\(\/[^ ]*\) (.*/\1/p' | while read -r library; do
            mkdir -p "$root/usr$(dirname "${library#/usr}")"
            cp -Ln "$library" "$root/usr${library#/usr}" || true
        done
    done
}
put /usr/bin/{sh,bash,python3,perl,curl,sleep,cat,head,echo,setsid,ls,env,id,getent,true,false,kill,setpriv,unshare,mount,umount,ip,sed,grep,mkdir,rm,ln,touch,dd,printf,seq,wc,tr,stat} /bin/sh
put /usr/lib/x86_64-linux-gnu/libnss_{dns,files}.so.2
cp -an /usr/lib/python3.11 "$root/usr/lib/" 2>/dev/null || true
rm -rf "$root"/usr/lib/python3.11/{test,idlelib,lib2to3,tkinter,ensurepip,pydoc_data}
for module in "$root"/usr/lib/python3.11/lib-dynload/*.so; do put "${module#"$root"}"; done
perl -e 'print join("\n", grep { -d } @INC), "\n"' | while read -r directory; do
    case $directory in /usr/lib/*perl-base*) mkdir -p "$root$directory" && cp -an "$directory/." "$root$directory/";; esac
done
cp "$cache/files/bin/busybox" "$root/usr/bin/busybox"
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n' >"$root/etc/passwd"
printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
printf 'hosts: files dns\n' >"$root/etc/nsswitch.conf"; printf '127.0.0.1 localhost\n' >"$root/etc/hosts"
: >"$root/etc/resolv.conf"; cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/" 2>/dev/null || true
printf 'version=6.1\n' >"$root/etc/os-release"

strip -o "$root/lg/latchgate" "${GATE:-target/$target/debug/latchgate}"
for binary in $built; do strip -o "$root/lg/deps/$(basename "$binary")" "$binary"; done

{
    echo '#!/usr/bin/busybox sh'
    echo 'export PATH=/usr/bin:/usr/sbin TMPDIR=/tmp HOME=/root RUST_BACKTRACE=0 LATCHGATE_UPGRADES=20 LATCHGATE_SOAK=40'
    echo 'bb=/usr/bin/busybox'
    # The first root of all cannot be pivoted away from, and every sandbox does.
    echo 'if [ ! -e /moved ]; then'
    echo '  $bb mkdir -p /new; $bb mount -t tmpfs -o size=85% tmpfs /new'
    echo '  for d in /*; do case $d in /new|/proc|/sys|/dev) ;; *) $bb cp -a $d /new/; case $d in /usr|/init) ;; *) $bb rm -rf $d;; esac;; esac; done'
    echo '  $bb mkdir -p /new/proc /new/sys /new/dev; $bb touch /new/moved; exec $bb switch_root /new /init'
    echo 'fi'
    echo '$bb mount -t proc proc /proc; $bb mount -t sysfs sys /sys; $bb mount -t devtmpfs dev /dev; $bb mkdir -p /dev/shm /dev/pts'
    echo '$bb mount -t devpts pts /dev/pts; $bb mount -t tmpfs tmp /tmp; $bb mount -t tmpfs shm /dev/shm; $bb mount -t tmpfs run /run'
    echo '$bb mount -t cgroup2 cgroup2 /sys/fs/cgroup; $bb mount -t bpf bpf /sys/fs/bpf; $bb ip link set lo up; ulimit -n 65536'
    echo '$bb ln -sf /proc/self/fd /dev/fd; exec >/dev/ttyS0 2>&1 </dev/null'
    echo 'echo "@ kernel $($bb uname -r), cgroup controllers: $($bb cat /sys/fs/cgroup/cgroup.controllers)"; cd /tmp'
    # Tests start in a cgroup of their own: the root of the tree can hold nobody else's limits.
    for suite in "${known[@]}"; do
        name=${suite%%:*} filter=; case $suite in *:*) filter=${suite#*:};; esac
        echo "echo '@ suite $name'; /lg/deps/$name-* --test-threads=2 $filter; echo \"@ result $name \$?\""
    done
    echo 'echo @ over; $bb poweroff -f'
} >"$root/init"
chmod +x "$root/init"
(cd "$root" && find . -print0 | "$cache/files/bin/busybox" cpio -0 -o -H newc 2>/dev/null | gzip -1 >"$work/initramfs.gz")

log=${LOG:-$work/log}
timeout "$patience" qemu-system-x86_64 -accel tcg,thread=multi -smp "${CPUS:-2}" -m "$memory" -cpu max -nographic -no-reboot -nodefaults \
    -serial stdio -kernel "$kernel" -initrd "$work/initramfs.gz" \
    -append 'console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off no_timer_check' </dev/null | tee "$log" || true
grep -q '^@ over' "$log" || { echo "the machine did not come to its end within $patience s" >&2; exit 1; }
! grep -E '^@ result' "$log" | grep -qv ' 0.\?$'
