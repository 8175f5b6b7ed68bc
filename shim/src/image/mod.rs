//! The image store.
use std::{path::{Path,PathBuf},sync::Arc};
#[derive(Clone)] pub struct Store;
pub struct StoreConfig; impl StoreConfig { pub fn new(_: PathBuf, _: PathBuf) -> Self { StoreConfig } }
pub struct Lease;
pub struct FsUsage { pub mountpoint: PathBuf, pub used_bytes: u64, pub inodes_used: u64 }
pub struct Layer { pub chain_id: String, pub path: PathBuf }
pub struct Image { pub id: String, pub repo_tags: Vec<String>, pub repo_digests: Vec<String>, pub size_bytes: u64, pub config: oci_spec::image::ImageConfiguration, pub layers: Vec<Layer> }
#[derive(Debug, thiserror::Error)] pub enum ImageError { #[error("x")] InvalidReference{a:u8}, #[error("x")] NotFound{a:u8}, #[error("x")] Unauthorized{a:u8}, #[error("x")] RegistryUnavailable{a:u8}, #[error("x")] Corrupt{a:u8}, #[error("x")] NoSpace{a:u8}, #[error("x")] Io }
pub enum RegistryAuth { Basic{username:String,password:String}, Bearer{token:String} }
impl Image { pub fn read_file(&self, _: &str, _: u64) -> Result<Option<Vec<u8>>, ImageError> { Ok(None) } }
impl Store {
 pub fn open(_: StoreConfig) -> Result<Store, ImageError> { Ok(Store) }
 pub async fn pull(&self, _: &str, _: Option<RegistryAuth>) -> Result<Arc<Image>, ImageError> { Err(ImageError::Io) }
 pub async fn import(&self, _: &Path) -> Result<Vec<Arc<Image>>, ImageError> { Err(ImageError::Io) }
 pub fn list(&self) -> Vec<Arc<Image>> { self.get("busybox").into_iter().collect() }
 pub fn get(&self, _: &str) -> Option<Arc<Image>> { Some(Arc::new(Image{ id: format!("sha256:{}","a".repeat(64)), repo_tags: vec!["docker.io/library/busybox:latest".into()], repo_digests: vec![], size_bytes: 1000, config: serde_json::from_str(r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"config":{"Cmd":["sh"]}}"#).expect("x"), layers: vec![Layer{chain_id:"sha256:x".into(), path:"/tmp/bb".into()}] })) }
 pub fn remove(&self, _: &str) -> Result<(), ImageError> { Ok(()) }
 pub fn lease(&self, _: &Image) -> Lease { Lease }
 pub fn lease_layers(&self, _: &[String]) -> Lease { Lease }
 pub fn usage(&self) -> FsUsage { FsUsage{mountpoint:"/".into(),used_bytes:1,inodes_used:1} }
}
