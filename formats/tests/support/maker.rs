//! Images made and judged by QEMU's tools. A missing tool fails the test and names the Debian package.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// An image file that QEMU's tools work on; it goes away with this value.
pub struct Maker {
    folder: tempfile::TempDir,
    /// The image's data lies in a file beside it.
    has_data_file: bool,
}

impl Maker {
    /// `qemu-img create -o options`, in memory.
    pub fn new(options: &str, size: u64) -> Self {
        Maker::empty(false).create(options, size)
    }

    /// The same with an external data file, which the image names by its path.
    pub fn with_data_file(options: &str, size: u64) -> Self {
        let maker = Maker::empty(true);
        let options = format!("{options},data_file={}", text(&maker.data_path()));
        maker.create(&options, size)
    }

    /// A file with these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Maker::of_files(bytes, None)
    }

    /// An image with these bytes, and its data file, if it has one.
    pub fn of_files(bytes: &[u8], data: Option<&[u8]>) -> Self {
        let maker = Maker::empty(data.is_some());
        std::fs::write(maker.path(), bytes).unwrap();
        if let Some(data) = data {
            std::fs::write(maker.data_path(), data).unwrap();
        }
        maker
    }

    fn empty(has_data_file: bool) -> Self {
        Maker { folder: tempfile::tempdir_in("/dev/shm").unwrap(), has_data_file }
    }

    fn create(self, options: &str, size: u64) -> Self {
        let path = self.path();
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&path), &size.to_string()]);
        self
    }

    /// Where the image is.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("image.qcow2")
    }

    /// Where its external data file is.
    pub fn data_path(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Another file beside it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs commands of qemu-io on it.
    pub fn io<S: AsRef<str>>(&self, commands: &[S]) -> &Self {
        let path = self.path();
        let mut args = vec!["-f", "qcow2", "-d", "unmap"];
        for command in commands {
            args.extend(["-c", command.as_ref()]);
        }
        args.push(text(&path));
        let output = run("qemu-io", &args);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(!said.contains("failed"), "{said}");
        self
    }

    /// Writes `content` at `at`; compressed, it has to be whole clusters.
    pub fn write(&self, at: u64, content: &[u8], compressed: bool) -> &Self {
        let source = self.file("source");
        std::fs::write(&source, content).unwrap();
        let how = if compressed { "write -q -c" } else { "write -q" };
        self.io(&[format!("{how} -s {} {at} {}", text(&source), content.len())])
    }

    /// Writes whole clusters compressed, in one go: only then QEMU packs the blobs, several to a cluster,
    /// and some in two.
    pub fn compress(&self, clusters: &[(u64, Vec<u8>)]) -> &Self {
        let commands: Vec<_> = clusters
            .iter()
            .enumerate()
            .map(|(number, (at, content))| {
                let source = self.file(&format!("source-{number}"));
                std::fs::write(&source, content).unwrap();
                format!("write -q -c -s {} {at} {}", text(&source), content.len())
            })
            .collect();
        self.io(&commands)
    }

    /// Takes an internal snapshot.
    pub fn snapshot(&self, name: &str) -> &Self {
        run("qemu-img", &["snapshot", "-c", name, text(&self.path())]);
        self
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    /// Those of its data file.
    pub fn data_bytes(&self) -> Option<Vec<u8>> {
        self.has_data_file.then(|| std::fs::read(self.data_path()).unwrap())
    }

    /// What `qemu-img check` exits with, and what it says.
    pub fn check(&self) -> (i32, String) {
        let data = self.data_path();
        check_files(&self.path(), self.has_data_file.then_some(&*data))
    }
}

/// What `qemu-img check` says of these bytes.
pub fn qemu_check(bytes: &[u8]) -> (i32, String) {
    Maker::of(bytes).check()
}

/// What `qemu-img check` says of a file, whatever has become of its backing file.
pub fn check_file(path: &Path) -> (i32, String) {
    check_files(path, None)
}

/// The same, with a data file that counts instead of the one that the image names.
pub fn check_files(path: &Path, data: Option<&Path>) -> (i32, String) {
    let node = |path| format!(r#"{{"driver":"file","filename":"{}"}}"#, text(path));
    let data = data.map_or_else(String::new, |data| format!(r#","data-file":{}"#, node(data)));
    let image = format!(r#"json:{{"driver":"qcow2","backing":null,"file":{}{data}}}"#, node(path));
    let output = try_run("qemu-img", &["check", &image]);
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8_lossy(&said).into_owned())
}

/// Runs one of QEMU's tools; fails unless it succeeds.
pub fn run(tool: &str, args: &[&str]) -> Output {
    let output = try_run(tool, args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {args:?}: {}{said}", String::from_utf8_lossy(&output.stdout));
    output
}

/// Runs one of QEMU's tools.
pub fn try_run(tool: &str, args: &[&str]) -> Output {
    let output = Command::new(tool).args(args).output();
    output.unwrap_or_else(|e| panic!("{tool} cannot be run ({e}); it is in the Debian package qemu-utils"))
}

/// A path of the tests as text.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
