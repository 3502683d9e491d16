#!/bin/bash
# Installs Apptainer for the container tests, and what building images and mounting them as an ordinary user need.
# Usage: install_apptainer.sh      as root on Debian; does nothing when it is there and runs; `make test` calls it.
# Elsewhere it says loudly that the container tests will be skipped, and ends with 0.
#
# Bookworm has no such package, and unstable's wants a newer C library. So its two programs (apptainer and starter) get
# a loader and libraries of their own beside the machine's (patchelf); nothing of the machine's C library is changed.
# The archive address is taken from the machine's own apt configuration, the packages are verified by its signature.
# It leaves: /usr/bin/apptainer, /usr/lib/x86_64-linux-gnu/apptainer, /etc/apptainer, /var/lib/apptainer, and a range of
# ids for root in /etc/subuid and /etc/subgid (builds with a %post section run in fakeroot mode).
set -euo pipefail
tools=(squashfs-tools squashfuse fuse3 uidmap patchelf mmdebstrap)
libraries=/usr/lib/x86_64-linux-gnu
place=$libraries/apptainer

skip() {
  printf '\n*** APPTAINER IS NOT INSTALLED: %s.\n*** The container tests will be SKIPPED on this machine.\n\n' "$*" >&2
  exit 0
}
fail() { echo "Apptainer was not installed: $*" >&2; exit 1; }
installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
runs() { command -v apptainer > /dev/null && apptainer --version > /dev/null 2>&1; }

[ -r /etc/os-release ] && distribution=$(. /etc/os-release && echo "${ID:-unknown}") || distribution=unknown
[ "$distribution" = debian ] || skip "this is $distribution, and this script is made for Debian"
missing=()
for tool in "${tools[@]}"; do installed "$tool" || missing+=("$tool"); done
if runs && [ ${#missing[@]} = 0 ]; then echo "Apptainer for the lab is installed already ($(apptainer --version))"; exit 0; fi
[ "$(id -u)" = 0 ] || skip "only root can install it (run $0 as root)"
runs || [ "$(uname -m)" = x86_64 ] || skip "this is $(uname -m), and this script is made for x86_64"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP
chmod 755 "$work"
export DEBIAN_FRONTEND=noninteractive
apt=(apt-get -qq -o DPkg::Lock::Timeout=300)
if [ ${#missing[@]} != 0 ]; then
  echo "installing ${missing[*]}"
  { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "${missing[@]}"; } > "$work/log" 2>&1 || {
    tail -n 20 "$work/log" >&2
    fail "apt-get could not install ${missing[*]}; the last lines of its output are above"
  }
fi

install_from_unstable() {
  local site own file name
  # no pipe into `grep -q`: it would end apt-get early, and pipefail makes that an error
  site=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -E '/debian/?$' | head -n 1) || true
  [ -n "$site" ] || fail "no Debian archive in the apt configuration of this machine"
  mkdir -p "$work"/{lists/partial,cache/archives/partial,tree,packages,parts}
  chmod 777 "$work/packages"   # apt downloads as a user of its own
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site sid main" > "$work/list"
  own=(-o "Dir::Etc::SourceList=$work/list" -o "Dir::Etc::SourceParts=$work/parts" -o "Dir::State::Lists=$work/lists"
       -o "Dir::Cache=$work/cache" -o Acquire::Languages=none)
  "${apt[@]}" "${own[@]}" update || fail "the list of Debian unstable could not be had"
  (cd "$work/packages" && "${apt[@]}" "${own[@]}" download apptainer libc6 libseccomp2 libsqlite3-0) || fail "no package"
  for file in "$work"/packages/*.deb; do dpkg-deb -x "$file" "$work/tree"; done

  mkdir -p "$place/glibc" /var/lib/apptainer/mnt/session /var/lib/apptainer/mnt/source
  cp -a "$work/tree$place/." "$place/"
  [ -e /etc/apptainer ] || cp -a "$work/tree/etc/apptainer" /etc/
  for name in libc.so.6 libm.so.6 libresolv.so.2 libpthread.so.0 libdl.so.2 ld-linux-x86-64.so.2 libnss_dns.so.2 \
              libnss_files.so.2 libseccomp.so.2 libsqlite3.so.0; do
    if [ -e "$work/tree$libraries/$name" ]; then cp -aL "$work/tree$libraries/$name" "$place/glibc/"; fi
  done
  for file in /usr/bin/apptainer "$place/bin/starter"; do
    cp "$work/tree$file" "$work/program"
    patchelf --set-interpreter "$place/glibc/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$place/glibc" "$work/program"
    install -m 755 "$work/program" "$file"
  done
}
if ! runs; then
  if [ -n "$(apt-cache policy apptainer | sed -n 's/^ *Candidate: *\([^(].*\)/\1/p')" ]; then
    "${apt[@]}" install -y --no-install-recommends apptainer > "$work/log" 2>&1 || fail "$(tail -n 1 "$work/log")"
  else
    install_from_unstable
  fi
fi
# a machine may lack one capability (for instance CAP_SYS_RESOURCE), and "full" then refuses to start at all; with "file"
# root has none inside a container, and unpacking an image, which runs in one, needs these
sed -i 's/^root default capabilities = .*/root default capabilities = file/' /etc/apptainer/apptainer.conf
wanted=CAP_CHOWN,CAP_DAC_OVERRIDE,CAP_DAC_READ_SEARCH,CAP_FOWNER,CAP_FSETID,CAP_SETUID,CAP_SETGID,CAP_SETFCAP
apptainer capability add --user root "$wanted,CAP_MKNOD,CAP_KILL,CAP_SYS_CHROOT" > /dev/null 2>&1 || true
for file in /etc/subuid /etc/subgid; do grep -q '^root:' "$file" 2> /dev/null || echo "root:200000:65536" >> "$file"; done
if [ -c /dev/fuse ]; then chmod 666 /dev/fuse; fi   # other users mount images through it
echo "installed: $(apptainer --version)"
