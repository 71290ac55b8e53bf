#!/usr/bin/env bash
# Put the headers of ONNX Runtime's C API into a folder: get_onnxruntime_headers.sh FOLDER
#
# They are those of Debian's package libonnxruntime-dev, which its releases have from trixie on. The package is fetched
# from wherever this machine's apt fetches Debian from, and only unpacked: nothing is installed, and apt's own lists stay
# as they are. On systems without apt, give cmake -DONNXRUNTIME_ROOT=FOLDER in place of this.
set -euo pipefail

release=trixie
package=libonnxruntime-dev
folder=${1:?usage: $0 FOLDER}

[ -e "$folder/onnxruntime_c_api.h" ] && exit
command -v apt-get dpkg-deb >/dev/null || { echo "$0: no apt here; give cmake -DONNXRUNTIME_ROOT=FOLDER" >&2; exit 1; }
. /etc/os-release
source=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
    awk -v here="${VERSION_CODENAME:-}" '$2 == here && $3 == "main" { print $1; exit }')
[ -n "$source" ] || { echo "$0: apt has no Debian source here; give cmake -DONNXRUNTIME_ROOT=FOLDER" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,archives/partial,package}
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keys] $source $release main" >"$work/sources.list"
apt=(apt-get -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$work/lists"
    -o Dir::Cache="$work" -o Dir::Cache::archives="$work/archives" -o APT::Sandbox::User=)
"${apt[@]}" update
(cd "$work" && "${apt[@]}" download "$package")
dpkg-deb -x "$work/$package"_*.deb "$work/package"
mkdir -p "$folder"
cp -r "$(dirname "$(find "$work/package" -name onnxruntime_c_api.h)")/." "$folder"
