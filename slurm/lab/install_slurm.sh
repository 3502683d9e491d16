#!/bin/bash
# Installs what the lab needs from the machine's own Debian archive: slurm-wlm, munge, slurmdbd, mariadb-server;
# also shellcheck, by which the tests read our batch scripts.
# Usage: install_slurm.sh      as root; does nothing when all are there; `make test` calls it behind a stamp.
# Elsewhere (not root, not Debian) it says loudly that the Slurm tests will be skipped, and ends with 0.
# No service is started, now or at the next boot; a policy-rc.d of the machine is put back as it was.
set -euo pipefail
packages=(slurm-wlm munge slurmdbd mariadb-server shellcheck)
services=(munge slurmctld slurmd slurmdbd mariadb)
policy=/usr/sbin/policy-rc.d

skip() {
  printf '\n*** SLURM IS NOT INSTALLED: %s.\n*** The tests below tests/slurm will be SKIPPED on this machine.\n\n' "$*" >&2
  exit 0
}
installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

[ -r /etc/os-release ] && distribution=$(. /etc/os-release && echo "${ID:-unknown}") || distribution=unknown
[ "$distribution" = debian ] || skip "this is $distribution, and the lab is made for Debian"
missing=()
for package in "${packages[@]}"; do installed "$package" || missing+=("$package"); done
if [ ${#missing[@]} = 0 ]; then echo "Slurm for the lab is installed already (${packages[*]})"; exit 0; fi
[ "$(id -u)" = 0 ] || skip "the packages ${missing[*]} are missing and only root can install them (run $0 as root)"

# services of packages that are new here are kept from starting; services that were here are left as they are
new_services=()
for service in "${services[@]}"; do
  [ -e "/lib/systemd/system/$service.service" ] || [ -e "/etc/init.d/$service" ] || new_services+=("$service")
done

kept=$(mktemp -d)
restore() {
  rm -f "$policy"
  if [ -e "$kept/policy" ] || [ -L "$kept/policy" ]; then cp -a "$kept/policy" "$policy"; fi
  rm -rf "$kept"
}
if [ -e "$policy" ] || [ -L "$policy" ]; then cp -a "$policy" "$kept/policy"; fi
trap restore EXIT
trap 'exit 130' INT TERM HUP
rm -f "$policy"   # may be a link to a file of the machine, which must not be written through
printf '#!/bin/sh\nexit 101\n' > "$policy"   # 101: "action forbidden" to invoke-rc.d, so no service starts
chmod 755 "$policy"

export DEBIAN_FRONTEND=noninteractive
apt=(apt-get -qq -o DPkg::Lock::Timeout=300)
echo "installing ${missing[*]} (about 75 s)"
"${apt[@]}" update || { echo "apt-get update failed: no network or a wrong archive address in /etc/apt" >&2; exit 1; }
"${apt[@]}" install -y --no-install-recommends "${missing[@]}" > "$kept/log" 2>&1 || {
  tail -n 30 "$kept/log" >&2
  echo "apt-get could not install ${missing[*]}; the last lines of its output are above" >&2
  exit 1
}
if command -v systemctl > /dev/null; then
  for service in "${new_services[@]}"; do systemctl --quiet disable "$service.service" > /dev/null 2>&1 || true; done
fi
echo "installed: $(dpkg-query -W -f '${Package} ${Version}, ' "${packages[@]}" | sed 's/, $//')"
