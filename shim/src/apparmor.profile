# What a container may do unless its pod chooses another profile: everything that its capabilities, its seccomp filter and the permissions
# of its files leave to it, except to mount, and to reach through /proc and /sys what belongs to the whole machine.
profile windlass-default flags=(attach_disconnected,mediate_deleted) {
  file,
  capability,
  network,
  unix,
  umount,
  deny mount,

  # Signals come from the monitor and the host, and go to processes of the same profile.
  signal (receive) peer=unconfined,
  signal (send, receive) peer=windlass-default,
  ptrace (trace, read, tracedby, readby) peer=windlass-default,

  # Of /proc, only processes' own files and the settings of shared memory, which belong to the container's ipc namespace, may be written.
  deny /proc/* w,
  deny /proc/[^1-9s]** w,
  deny /proc/s[^y]** w,
  deny /proc/sys/[^k]** w,
  deny /proc/sys/kernel/[^s]** w,
  deny /proc/sys/kernel/s[^h]** w,
  deny /proc/sys/kernel/sh[^m]** w,
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,
  deny /proc/kmem rwklx,
  deny /proc/mem rwklx,

  # Of /sys, only the container's own cgroups may be written; firmware and the security modules are not even read.
  deny /sys/[^f]** wklx,
  deny /sys/f[^s]** wklx,
  deny /sys/fs/[^c]** wklx,
  deny /sys/fs/c[^g]** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/kernel/security/** rwklx,
}
