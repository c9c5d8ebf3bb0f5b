//! Block nodes in both notations, and what is wrong with others.

use super::*;

fn list(text: &str) -> Result<Image, String> {
    from_options(tree::from_list(text)?)
}

fn name(text: &str, format: Option<&str>) -> Result<Image, String> {
    from_filename(text, text.into(), format)
}

fn image(path: &str, format: Option<Format>) -> Image {
    Image { path: path.into(), format, ..Image::default() }
}

#[test]
fn file_names() {
    assert_eq!(name("a:b/c", None), Err("Unknown protocol 'a'".to_owned()));
    assert_eq!(name("./a:b", None), Ok(image("./a:b", None)));
    assert_eq!(name("file:a", Some("raw")), Ok(image("a", Some(Format::Raw))));
    assert_eq!(name("x", Some("nope")), Err("Unknown driver 'nope'".to_owned()));
    assert!(name("x", Some("vmdk")).unwrap_err().contains("not supported"));
    assert!(name("https://host/x", None).unwrap_err().contains("'https' is not supported"));
}

#[test]
fn nodes_in_both_notations() {
    let qcow2 = Image { backing: Some(BackingNode::None), ..image("f", Some(Format::Qcow2)) };
    let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"f"},"backing":null}"#;
    assert_eq!(name(json, None), Ok(qcow2));
    let raw = name(r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"f"}}"#, Some("raw"));
    assert_eq!(raw, Ok(image("f", Some(Format::Raw))));
    let compressed = "driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename=a,,b";
    let want = Image { compress: true, ..image("a,b", Some(Format::Qcow2)) };
    assert_eq!(list(compressed), Ok(want));
    assert_eq!(list("driver=file,filename=a"), Ok(image("a", Some(Format::Raw))));
    assert_eq!(list("file.filename=a"), Ok(image("a", None)));
    let named = list("driver=qcow2,backing.driver=raw,backing.file.filename=b,file.filename=a").unwrap();
    let raw = BackingNode::Image { path: "b".into(), format: Some(Format::Raw) };
    assert_eq!(named.backing, Some(raw));
}

#[test]
fn windows() {
    let part = list("driver=raw,offset=1M,size=512,file.driver=file,file.filename=a").unwrap();
    assert_eq!(part.window, Window { offset: 1 << 20, size: Some(512) });
    let tar = list("driver=qcow2,file.driver=raw,file.offset=1K,file.size=2K,file.file.filename=a").unwrap();
    assert_eq!(tar.file_window, Window { offset: 1024, size: Some(2048) });
    assert_eq!((tar.window, tar.format), (Window::default(), Some(Format::Qcow2)));
    let two = list(
        "driver=raw,offset=512,size=512,file.driver=raw,file.offset=1K,file.size=1K,file.file.filename=a",
    );
    assert_eq!(two.unwrap().window, Window { offset: 1536, size: Some(512) });
    let beyond = list("driver=raw,offset=2K,file.driver=raw,file.size=1K,file.file.filename=a");
    assert!(beyond.unwrap_err().contains("beyond"));
}

#[test]
fn generic_options_of_any_node() {
    let got = list(
        "driver=qcow2,read-only=on,discard=unmap,detect-zeroes=on,node-name=n,cache.no-flush=on,l2-cache-size=1M,\
         lazy-refcounts=on,file.driver=file,file.filename=a,file.cache.direct=on,file.aio=native,\
         file.locking=auto,file.discard=ignore,force-share=on,auto-read-only=on",
    )
    .unwrap();
    let want = Image {
        read_only: Some(true),
        auto_read_only: true,
        force_share: true,
        direct: Some(true),
        discard: Some(false),
        detect_zeroes: Some(DetectZeroes::On),
        aio: Some(Aio::Native),
        table_cache_len: Some(1 << 20),
        ..image("a", Some(Format::Qcow2))
    };
    assert_eq!(got, want);
}

#[test]
fn mistakes() {
    for (text, want) in [
        ("driver=raw,file.filename=a,foo=bar", "Block format 'raw' does not support the option 'foo'"),
        (
            "driver=raw,file.driver=file,file.filename=a,file.foo=b",
            "Block protocol 'file' doesn't support the option 'foo'",
        ),
        ("driver=nope", "Unknown driver 'nope'"),
        ("driver=qcow2", "A block device must be specified for \"file\""),
        ("driver=raw,size=1,file.filename=a", "Specified size is not multiple of 512"),
        ("driver=raw,read-only=maybe,file.filename=a", "Parameter 'read-only' expects 'on' or 'off'"),
        ("driver=raw,file=x", "Cannot find device='x' nor node-name='x'"),
        ("driver=qcow2,backing=b,file.filename=a", "Cannot find device='b' nor node-name='b'"),
    ] {
        assert_eq!(list(text), Err(want.to_owned()), "{text}");
    }
    for (text, hint) in [
        ("driver=luks,file.filename=a", "'luks' is not supported"),
        ("driver=nbd,host=h", "'nbd' is not supported"),
        ("driver=file,filename=a,locking=off", "locking=off is not supported"),
        ("driver=qcow2,encrypt.format=luks,file.filename=a", "encrypt"),
    ] {
        let error = list(text).unwrap_err();
        assert!(error.contains(hint), "{text}: {error}");
    }
}
