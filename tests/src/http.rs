//! HTTP as a platform speaks it to the daemons: over HTTP/2 on a gRPC connection, and in bare words over HTTP/1.1.

use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::body::Body;
use tonic::client::GrpcService as _;
use tonic::codegen::Body as _;
use tonic::codegen::http::{Method, Request};
use tonic::transport::Channel;

/// For one answer on a busy machine.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// What came back.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Of HTTP.
    pub status: u16,
    /// The content type.
    pub kind: String,
    /// All of it.
    pub text: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Errors
    /// It is none.
    pub fn json(&self) -> Result<Value> {
        ensure!(self.kind == "application/json", "{self:?}");
        serde_json::from_str(&self.text).with_context(|| self.text.clone())
    }

    /// The body of an answer that must be a success.
    ///
    /// # Errors
    /// It is none.
    pub fn good(&self) -> Result<Value> {
        ensure!(self.status == 200, "{self:?}");
        self.json()
    }

    /// Whether it is this refusal: status, gRPC's word, and words of the message.
    ///
    /// # Errors
    /// It is another.
    pub fn refused(&self, status: u16, code: &str, words: &str) -> Result<()> {
        let json = self.json()?;
        let error = &json["error"];
        let said = error["message"].as_str().unwrap_or_default();
        ensure!(
            self.status == status && error["code"] == code && said.contains(words),
            "expected {status}, {code}, '{words}': {self:?}"
        );
        Ok(())
    }
}

/// Asks over HTTP/2.
///
/// # Errors
/// No answer.
pub async fn ask(
    channel: &Channel,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Result<Answer> {
    let mut request = Request::builder()
        .method(Method::from_bytes(method.as_bytes())?)
        .uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Body::new(body.to_owned()))?;
    let exchange = async {
        let mut channel = channel.clone();
        std::future::poll_fn(|context| channel.poll_ready(context)).await?;
        let response = channel.call(request).await?;
        let status = response.status().as_u16();
        let kind = response
            .headers()
            .get("content-type")
            .and_then(|kind| kind.to_str().ok());
        let kind = kind.unwrap_or_default().to_owned();
        let mut body = response.into_body();
        let mut bytes = Vec::new();
        while let Some(frame) = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await
        {
            if let Ok(data) = frame?.into_data() {
                bytes.extend_from_slice(&data);
            }
        }
        let text = String::from_utf8(bytes)?;
        Ok(Answer { status, kind, text })
    };
    tokio::time::timeout(ANSWER_WITHIN, exchange)
        .await
        .with_context(|| format!("{method} {path}"))?
}

/// Asks over HTTP/2, without headers and body.
///
/// # Errors
/// No answer.
pub async fn get(channel: &Channel, path: &str) -> Result<Answer> {
    ask(channel, "GET", path, &[], "").await
}

/// Sends `words` as they are on a connection of their own, and gives all that comes until the other side ends it.
///
/// # Errors
/// It does not end in time.
pub async fn say(address: SocketAddr, words: &str) -> Result<String> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(words.as_bytes()).await?;
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await?;
        Ok(String::from_utf8_lossy(&heard).into_owned())
    };
    tokio::time::timeout(ANSWER_WITHIN, exchange).await?
}
