#!/bin/bash
# build.sh DIRECTORY: builds the guest's kernel as DIRECTORY/linux from the newest linux-source of Debian's backports, with kernel.config beside
# this script. About ten minutes on two cores, 2 GB of disk meanwhile. Takes the packages of a kernel build from Debian if they are missing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
to=$(realpath "$1")
suite=${WINDLASS_GUEST_SUITE:-trixie-backports}
work=$to/build
package="the source"
mkdir -p "$work/sources" "$work/lists/partial" "$work/archives/partial"

needed=()
for pair in gcc:gcc make:make flex:flex bison:bison bc:bc xz:xz-utils perl:perl; do
    command -v "${pair%:*}" >/dev/null || needed+=("${pair#*:}")
done
[ -e /usr/include/libelf.h ] || needed+=(libelf-dev)
if [ ${#needed[@]} -gt 0 ]; then
    echo "installing ${needed[*]}"
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${needed[@]}" >/dev/null
fi

# The suite is looked up with a package list of our own: the machine's sources stay as they are.
lines=$(grep -rhE '^(URIs:|deb )' /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null || true)
mirror=$(grep -oE 'https?://[^ ]+/debian/?( |$)' <<<"$lines" | head -1 | tr -d ' ' || true)
[ -n "$mirror" ] || { echo "no Debian mirror in /etc/apt; set WINDLASS_GUEST_KERNEL to a ready kernel instead" >&2; exit 1; }
cat >"$work/sources/guest.sources" <<S
Types: deb
URIs: $mirror
Suites: $suite
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
S
apt=(-o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/sources" -o "Dir::State::lists=$work/lists"
    -o "Dir::Cache=$work" -o "Dir::Cache::archives=$work/archives" -o APT::Sandbox::User=root)
cd "$work"
if [ ! -d linux ]; then
    apt-get "${apt[@]}" update -qq
    package=$(apt-cache "${apt[@]}" depends linux-source | sed -n 's/.*Depends: \(linux-source-[^ ]*\)$/\1/p' | head -1)
    echo "unpacking $package"
    apt-get "${apt[@]}" download -qq "$package"
    rm -rf unpacked && mkdir unpacked
    dpkg-deb --fsys-tarfile "$package"_*.deb | tar -xOf - --wildcards './usr/src/linux-source-*.tar.xz' | tar -xJf - -C unpacked --strip-components=1
    rm "$package"_*.deb
    mv unpacked linux
fi
cd linux
make -s ARCH=um defconfig
./scripts/kconfig/merge_config.sh -m .config "$here/kernel.config" >/dev/null
make -s ARCH=um olddefconfig
for line in CONFIG_MEMCG CONFIG_CGROUP_PIDS CONFIG_CPUSETS CONFIG_CFS_BANDWIDTH CONFIG_SECURITY_APPARMOR CONFIG_HOSTFS CONFIG_OVERLAY_FS CONFIG_VETH; do
    grep -qx "$line=y" .config || { echo "$package has no $line" >&2; exit 1; }
done
make -s ARCH=um -j"${JOBS:-$(nproc)}" linux
strip -o "$to/linux.new" linux
mv "$to/linux.new" "$to/linux"
cd "$to" && rm -rf "$work"
