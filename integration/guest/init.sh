#!/bin/sh
# First process of the test guest, a user-mode-linux kernel whose root is the host's file tree, read-only. Lays a throw-away overlay over it,
# mounts what a machine has (all of cgroup v2 among it), runs <run>/command, leaves its output and status in <run>, and powers off.
# Kernel command line: windlass.run=DIR, the one directory of the host that is written; windlass.see=DIR, shown even below /tmp or /run;
# windlass.init=systemd: Debian's systemd and message bus take over as the first process, and run the command as a service.
set -u
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
off() {
    [ $# = 0 ] || echo "guest init: $*" >/dev/kmsg
    /bin/busybox poweroff -f
}

if [ "${1:-}" != rooted ]; then
    mount -t proc proc /proc
    mount -t tmpfs -o mode=755 guest /mnt || off no tmpfs
    mkdir /mnt/upper /mnt/work /mnt/root
    mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work guest-root /mnt/root || off no overlay
    mount -t devtmpfs dev /mnt/root/dev || off no devtmpfs
    umount /proc
    cd /mnt/root && pivot_root . mnt || off no pivot_root
    exec chroot . /bin/sh "$0" rooted
fi

mount -t proc -o nosuid,nodev,noexec proc /proc || off no proc
umount -l /mnt
for word in $(cat /proc/cmdline); do
    case $word in
    windlass.run=*) run=${word#*=} ;;
    windlass.see=*) see=${word#*=} ;;
    windlass.init=*) init=${word#*=} ;;
    esac
done
mount -t sysfs -o nosuid,nodev,noexec sys /sys
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t mqueue mqueue /dev/mqueue
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=755 tmp /var/tmp
mount -t securityfs security /sys/kernel/security
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 -o nsdelegate,memory_recursiveprot cgroup /sys/fs/cgroup || off no cgroup2
ln -sf /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do ln -sf "/proc/self/fd/${number%:*}" "/dev/${number#*:}"; done
mkdir -p "$see" "$run"
mount -t hostfs -o "$see" none "$see" || off "no hostfs at $see"
mount -o remount,ro "$see"
mount -t hostfs -o "$run" none "$run" || off "no hostfs at $run"
mount --make-rshared /
ip link set lo up
echo guest >/proc/sys/kernel/hostname
echo 1 >/proc/sys/net/ipv4/ip_forward

# Nothing of the host's own units is started: no default dependencies, and a bus of our own.
if [ "${init:-}" = systemd ]; then
    units=/run/systemd/system
    mkdir -p $units /run/dbus
    cat >$units/guest.target <<U
[Unit]
DefaultDependencies=no
Requires=dbus.socket
Wants=command.service
U
    cat >$units/dbus.socket <<U
[Unit]
DefaultDependencies=no
[Socket]
ListenStream=/run/dbus/system_bus_socket
U
    cat >$units/dbus.service <<U
[Unit]
DefaultDependencies=no
Requires=dbus.socket
[Service]
Type=notify
ExecStart=/usr/bin/dbus-daemon --system --address=systemd: --nofork --nopidfile --systemd-activation
StandardOutput=null
U
    cat >$units/command.service <<U
[Unit]
DefaultDependencies=no
After=dbus.socket
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
Delegate=yes
StandardOutput=file:$run/output
StandardError=file:$run/output
ExecStart=-/bin/sh -c 'sh $run/command; echo \$\$? >$run/status.new; mv $run/status.new $run/status'
U
    exec /lib/systemd/systemd --unit=guest.target --log-target=console --show-status=no
    off no systemd
fi

# The root of the tree must be empty of processes before its controllers are given to the groups below.
mkdir /sys/fs/cgroup/init
echo 1 >/sys/fs/cgroup/init/cgroup.procs
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done

setsid sh "$run/command" <"/dev/null" >"$run/output" 2>&1
echo $? >"$run/status.new"
mv "$run/status.new" "$run/status"
off
