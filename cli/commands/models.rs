//! Models and their servers: `models`, `endpoints`, `deploy`, `serve`, `predict`.

use std::io::Read;
use std::path::{Path, PathBuf};

use algorithms::{GenerateInput, Request, Response};
use api::config::StoreSection;
use api::records::EndpointSpec;
use api::{ExitClass, Name};
use checkpoint::Store;
use serve::{LoadedModel, Server, ServerOptions};
use tokio_util::sync::CancellationToken;

use super::roles::load_config;
use crate::args::{Deploy, Global, Predict, Serve};
use crate::context::Access;
use crate::error::{CliError, Result};
use crate::output;
use crate::signals::{EXIT_INTERRUPTED, Signals};

/// A request on the command line is small; more is a mistake.
const INPUT_BYTES_MAX: u64 = 64 << 20;

/// `cluster models`.
pub async fn list(global: &Global) -> Result<()> {
    let (access, _) = Access::find(global)?;
    let models = access.connect().await?.models().await?;
    if global.json {
        models.iter().for_each(|(_, model)| output::json(model));
        return Ok(());
    }
    let rows = models
        .iter()
        .map(|(_, model)| {
            let metrics: Vec<String> = model
                .fact
                .metrics
                .iter()
                .map(|(name, value)| format!("{name} {value:.4}"))
                .collect();
            vec![
                model.name.to_string(),
                model.algorithm.clone(),
                output::bytes(model.fact.bytes),
                output::ago(model.created_ms),
                metrics.join(", "),
            ]
        })
        .collect();
    output::table(&["name", "algorithm", "size", "created", "metrics"], rows, "no models");
    Ok(())
}

/// `cluster endpoints`.
pub async fn endpoints(global: &Global) -> Result<()> {
    let (access, _) = Access::find(global)?;
    let endpoints = access.connect().await?.endpoints().await?;
    if global.json {
        endpoints.iter().for_each(|(_, endpoint)| output::json(endpoint));
        return Ok(());
    }
    let rows = endpoints
        .iter()
        .map(|(_, endpoint)| {
            let address = endpoint.status.address.map(|a| format!("http://{a}"));
            vec![
                endpoint.spec.name.to_string(),
                endpoint.spec.model.to_string(),
                endpoint.status.phase.to_string(),
                address.unwrap_or_else(|| "-".into()),
                endpoint.status.reason.clone(),
            ]
        })
        .collect();
    output::table(&["name", "model", "state", "address", "reason"], rows, "no endpoints");
    Ok(())
}

/// `cluster deploy MODEL`: returns once the endpoint answers, or says why it does not.
pub async fn deploy(global: &Global, args: &Deploy) -> Result<()> {
    let model: Name = args.model.parse()?;
    let name: Name = args.name.as_deref().unwrap_or(&args.model).parse()?;
    if !args.listen.ip().is_loopback() {
        return Err(CliError::usage(format!(
            "--listen {}: endpoints speak plain HTTP and so listen on loopback only; put a proxy \
             with TLS in front",
            args.listen
        )));
    }
    let (access, _) = Access::find(global)?;
    let client = access.connect().await?;
    let spec = EndpointSpec { name: name.clone(), model, listen: args.listen };
    client.deploy(&spec).await?;
    let endpoint = client.wait_for_endpoint(&name).await?;
    let Some(address) = endpoint.status.address else {
        let cause = endpoint.status.first_cause.map(|f| f.cause.to_string()).unwrap_or_default();
        let text = format!("endpoint `{name}` does not run: {}", endpoint.status.reason);
        return Err(CliError::new(ExitClass::JobFailed, text).with_hint(cause));
    };
    if global.json {
        output::json(&endpoint);
    } else {
        output::line(&format!("endpoint `{name}` answers at http://{address}/invocations"));
    }
    Ok(())
}

/// `cluster serve MODEL`.
pub async fn serve(global: &Global, args: &Serve) -> Result<()> {
    let config = load_config(global)?;
    let listen = args.listen.unwrap_or(config.serve.listen);
    if !listen.ip().is_loopback() {
        return Err(CliError::usage(format!(
            "serve.listen = {listen} is not loopback and the server speaks plain HTTP: listen on \
             127.0.0.1 and put a proxy with TLS in front"
        )));
    }
    let mut signals = Signals::new()?;
    let model = load(global, &args.model).await?;
    let server = Server::bind(ServerOptions { listen, section: config.serve }, model).await?;
    if global.json {
        output::json(&serde_json::json!({ "event": "serving", "address": server.address() }));
    } else {
        output::line(&format!("serving `{}` at http://{}", args.model, server.address()));
        output::line("GET /ping, POST /invocations, GET /metrics; stop with Ctrl-C");
    }
    let shutdown = CancellationToken::new();
    let running = server.run(shutdown.clone());
    tokio::pin!(running);
    tokio::select! {
        ended = &mut running => return Ok(ended?),
        () = signals.wait() => shutdown.cancel(),
    }
    tokio::select! {
        ended = &mut running => Ok(ended?),
        () = signals.wait() => std::process::exit(EXIT_INTERRUPTED),
    }
}

/// A model from a path, or from the cluster's registry.
async fn load(global: &Global, model: &str) -> Result<LoadedModel> {
    if Path::new(model).exists() {
        return Ok(serve::load_folder(Path::new(model))?);
    }
    let not_found = |detail: String| {
        CliError::new(ExitClass::NotFound, format!("no model `{model}`: {detail}")).with_hint(
            "name a folder with model.safetensors and model.json, or a model of `cluster models`",
        )
    };
    let name: Name = model.parse().map_err(|_| not_found("there is no such path".into()))?;
    let (access, section) = Access::find(global)
        .map_err(|e| not_found(format!("no such path, and {}", e.message())))?;
    let models = access.connect().await?.models().await?;
    let Some((_, record)) = models.into_iter().find(|(_, record)| record.name == name) else {
        return Err(not_found("neither a path nor a registered model".into()));
    };
    let store = open_store(&section, &access)?;
    Ok(serve::load_from_store(&store, &record.fact.key).await?)
}

fn open_store(section: &StoreSection, access: &Access) -> Result<Store> {
    Ok(Store::open(section, &access.store_uri)?)
}

/// `cluster predict MODEL`.
pub async fn predict(global: &Global, args: &Predict) -> Result<()> {
    let (content_type, body) = request_body(args)?;
    if let Some(url) = endpoint_url(global, &args.model).await? {
        return predict_remote(global, args, &url, &content_type, body).await;
    }
    let mut model = load(global, &args.model).await?;
    let bad = |e: algorithms::RequestError| CliError::usage(e.to_string());
    let accepted = model.predictor.request_types();
    let requests = serve::parse_request(&content_type, &body, &accepted).map_err(bad)?;
    for request in &requests {
        model.predictor.check(request).map_err(bad)?;
    }
    for answer in model.predictor.predict(requests) {
        let answer = answer.map_err(bad)?;
        if global.json {
            output::json(&answer);
        } else {
            print_answer(args, &answer);
        }
    }
    Ok(())
}

fn print_answer(args: &Predict, answer: &Response) {
    match answer {
        Response::Class { label, probability, probabilities } => {
            output::line(&format!("{label} ({:.1} %)", probability * 100.0));
            let mut ranked = probabilities.clone();
            ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
            for (label, probability) in ranked.iter().skip(1).take(2) {
                output::line(&format!("  {label} ({:.1} %)", probability * 100.0));
            }
        }
        Response::Text { text, .. } => {
            output::line(&format!("{}{text}", args.text.as_deref().unwrap_or_default()));
        }
    }
}

/// The request and its content type, from the command line, a file or standard input.
fn request_body(args: &Predict) -> Result<(String, Vec<u8>)> {
    if let Some(text) = &args.text {
        let request = Request::Generate(GenerateInput {
            prompt: text.clone(),
            max_tokens: args.max_tokens,
            temperature: args.temperature,
            top_k: args.top_k,
            seed: args.seed,
        });
        return Ok(("application/json".into(), serve::request_json(&request).into_bytes()));
    }
    let Some(path) = &args.input else {
        return Err(CliError::usage("nothing to ask: give --input FILE or --text TEXT"));
    };
    let mut body = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().take(INPUT_BYTES_MAX + 1).read_to_end(&mut body)
    } else {
        std::fs::File::open(path).and_then(|f| f.take(INPUT_BYTES_MAX + 1).read_to_end(&mut body))
    };
    read.map_err(|e| CliError::usage(format!("cannot read `{}`: {e}", path.display())))?;
    if body.len() as u64 > INPUT_BYTES_MAX {
        let limit = output::bytes(INPUT_BYTES_MAX);
        return Err(CliError::usage(format!("`{}` is larger than {limit}", path.display())));
    }
    Ok((content_type(path).into(), body))
}

fn content_type(path: &Path) -> &'static str {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    match extension.to_lowercase().as_str() {
        "jsonl" | "ndjson" => "application/jsonlines",
        "csv" => "text/csv",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "txt" => "text/plain",
        _ => "application/json",
    }
}

/// The address of a running endpoint of this name, unless the name is a path.
async fn endpoint_url(global: &Global, name: &str) -> Result<Option<String>> {
    if name.starts_with("http://") {
        return Ok(Some(format!("{}/invocations", name.trim_end_matches('/'))));
    }
    if PathBuf::from(name).exists() || name.parse::<Name>().is_err() {
        return Ok(None);
    }
    let Ok((access, _)) = Access::find(global) else { return Ok(None) };
    let endpoints = access.connect().await?.endpoints().await?;
    let found = endpoints.into_iter().find(|(_, endpoint)| endpoint.spec.name.as_str() == name);
    Ok(found.and_then(|(_, e)| e.status.address).map(|a| format!("http://{a}/invocations")))
}

async fn predict_remote(
    global: &Global,
    args: &Predict,
    url: &str,
    content_type: &str,
    body: Vec<u8>,
) -> Result<()> {
    let unreachable =
        |e: reqwest::Error| CliError::new(ExitClass::Unavailable, format!("cannot ask {url}: {e}"));
    let client = reqwest::Client::builder().build().map_err(unreachable)?;
    let answer = client
        .post(url)
        .header("content-type", content_type)
        .body(body)
        .send()
        .await
        .map_err(unreachable)?;
    let status = answer.status();
    let text = answer.text().await.map_err(unreachable)?;
    if !status.is_success() {
        let class =
            if status.is_client_error() { ExitClass::Usage } else { ExitClass::Unavailable };
        return Err(CliError::new(class, format!("{url} answered {status}: {}", text.trim())));
    }
    match serde_json::from_str::<Response>(&text) {
        Ok(answer) if !global.json => print_answer(args, &answer),
        _ => output::line(text.trim_end()),
    }
    Ok(())
}
