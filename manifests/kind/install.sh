#!/bin/sh
# install.sh FOLDER ARCHIVE...: makes the root that it runs in, a kind node image's, one with Windlass as its runtime. FOLDER has the Debian
# package, crictl.yaml and this folder; the archives are the images that the node brings.
set -eu
from=$1
shift

# kind's images have what the package depends on; others fetch it.
export DEBIAN_FRONTEND=noninteractive
package() { apt-get install -y --no-install-recommends -o Dpkg::Options::=--force-confold "$from"/windlass_*.deb; }
mkdir -p /etc/windlass /etc/containerd
cp "$from/kind/config.toml" /etc/windlass/config.toml
package || { apt-get update && package; }
rm -rf /var/lib/apt/lists/* /var/lib/containerd

# kind looks for the runtime under containerd's names: programs, unit and configuration.
rm -f /usr/local/bin/containerd* /etc/systemd/system/multi-user.target.wants/windlass.service
cp /usr/lib/systemd/system/windlass.service /etc/systemd/system/containerd.service
ln -sf containerd.service /etc/systemd/system/windlass.service
cp "$from"/kind/bin/* /usr/local/bin/
chmod 755 /usr/local/bin/ctr /usr/local/bin/containerd
cp "$from/kind/containerd.toml" /etc/containerd/config.toml
cp "$from/crictl.yaml" /etc/crictl.yaml

# Layers as images: a build may make no device nodes and no trusted attributes, which layers in directories need.
sed -i 's/^\[images\]$/&\nlayers = "erofs"/' /etc/windlass/config.toml
for archive in "$@"; do windlass image import "$archive"; done
sed -i '/^layers = "erofs"$/d' /etc/windlass/config.toml
