//! `--help` and `--version`.

/// The version of QEMU whose command line is matched: callers ask for at least some version of it.
const QEMU_VERSION: &str = "10.0.2";

/// The answer to `--version`, whose first line callers parse.
pub fn version() -> String {
    format!(
        "qemu-nbd {QEMU_VERSION} (nbd-img {})\nnbd-img under the command line of qemu-nbd; it is not QEMU.\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// The answer to `--help`, which callers search for options.
pub fn help(program: &str) -> String {
    format!(
        "Usage: {program} [OPTIONS] FILE\n  or:  {program} -L [OPTIONS]\n  or:  {program} -d DEV\n{OPTIONS}"
    )
}

const OPTIONS: &str = "\
nbd-img under the command line of qemu-nbd: serves a raw or qcow2 image over NBD.

  -h, --help                this text
  -V, --version             the versions of nbd-img and of the command line

Where and for whom:
  -p, --port=PORT           TCP port (10809)
  -b, --bind=IFACE          address or name to listen on (0.0.0.0: all of the machine's)
  -k, --socket=PATH         Unix socket in place of TCP; an absolute path
  -e, --shared=NUM          most clients at a time, 0 for as many as can be (1); more wait their turn
  -t, --persistent          go on after the last client has left
  -v, --verbose             keep stderr in the background; with --connect, stay in the foreground
  -x, --export-name=NAME    name of the export (empty)
  -D, --description=TEXT    text about the export, shown to clients that list it
      --handshake-limit=N   seconds that a client has for its handshake, 0 for no limit (10)

What is shown:
  -o, --offset=OFFSET       first byte of the disk
  -A, --allocation-depth    offer the metadata context qemu:allocation-depth
  -B, --bitmap=NAME         offer a persistent dirty bitmap (repeatable)

The process:
  -L, --list                show the exports of the server at --bind, --port or --socket
      --object TYPE,id=ID,...
                            define what other options refer to: tls-creds-x509, tls-creds-psk, authz-simple,
                            authz-list, authz-list-file, secret ('--object help' lists all)
      --tls-creds=ID        use TLS with this object
      --tls-authz=ID        let in only clients that this object allows
      --tls-hostname=NAME   with --list: the name in the server's certificate
  -T, --trace PATTERN       log connections and what becomes of them, whatever the pattern
      --fork                return once the server listens, and serve in the background
      --pid-file=PATH       write the process id of the server to this file
      --selinux-label=LABEL SELinux context of the listening socket

Kernel device:
  -c, --connect=DEV         serve FILE to the device DEV (/dev/nbdN)
  -d, --disconnect          disconnect a device

Image:
  -f, --format=FORMAT       raw or qcow2; without, the format is probed
  -r, --read-only           refuse writes
  -s, --snapshot            writes go to a temporary overlay
  -l, --load-snapshot=SNAPSHOT
                            show this internal snapshot, read-only: NAME, ID, snapshot.id=ID or snapshot.name=NAME
  -n, --nocache             the same as --cache=none
      --cache=MODE          none, writeback (the default), writethrough, directsync or unsafe
      --aio=MODE            threads, native or io_uring
      --discard=MODE        ignore (the default) or unmap
      --detect-zeroes=MODE  off (the default), on or unmap
      --image-opts          FILE is a list of block driver options
";

#[cfg(test)]
mod tests {
    use super::super::line::OPTIONS as ALL;
    use super::*;

    #[test]
    fn help_names_every_option() {
        let text = help("qemu-nbd");
        for option in ALL {
            let long = format!("--{}", option.long);
            assert!(text.contains(&long), "{long}");
            if let Some(short) = option.short {
                assert!(text.contains(&format!("-{}, {long}", char::from(short))), "{long}");
            }
        }
    }

    #[test]
    fn callers_find_three_numbers_in_the_second_word() {
        let text = version();
        let word = text.lines().next().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
        let numbers: Vec<u32> = word.split('.').map(|number| number.parse().unwrap()).collect();
        assert!(numbers.len() == 3 && numbers.as_slice() >= [5, 2, 0].as_slice(), "{text}");
    }
}
