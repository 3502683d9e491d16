#!/bin/bash
# Installs Debian's Chromium, in which the tests look at report pages. Usage: install_chromium.sh   as root on Debian;
# elsewhere, or when it is there, it does nothing but say so. `make test` calls it.
set -euo pipefail

skip() {
  printf '\n*** CHROMIUM IS NOT INSTALLED: %s.\n*** The tests that look at pages will be SKIPPED on this machine.\n\n' "$*" >&2
  exit 0
}

if command -v chromium > /dev/null; then echo "Chromium for the tests of pages is installed already"; exit 0; fi
[ -r /etc/os-release ] && distribution=$(. /etc/os-release && echo "${ID:-unknown}") || distribution=unknown
[ "$distribution" = debian ] || skip "this is $distribution, and the tests know Debian's package"
[ "$(id -u)" = 0 ] || skip "only root can install it (apt-get install chromium)"

export DEBIAN_FRONTEND=noninteractive
apt=(apt-get -qq -o DPkg::Lock::Timeout=300)
echo "installing chromium (about a minute)"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends chromium fonts-dejavu-core; } > "$log" 2>&1 || {
  tail -n 20 "$log" >&2
  skip "apt-get could not install it; the last lines of its output are above"
}
echo "installed: $(chromium --version 2> /dev/null || echo chromium)"
