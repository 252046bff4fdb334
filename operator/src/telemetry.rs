//! Logs: one JSON object per line on standard output, with field names of the Elastic Common Schema.

use std::{fmt, io::Write};

use jiff::Timestamp;
use serde_json::{Map, Value};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{
    EnvFilter, Layer,
    layer::{Context, SubscriberExt},
    registry::{LookupSpan, Scope},
    util::SubscriberInitExt,
};

/// Sends this process's logs to standard output; `RUST_LOG` filters them.
pub fn init() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,kube=warn"));
    tracing_subscriber::registry()
        .with(Ecs(print).with_filter(filter))
        .init();
}

fn print(line: &str) {
    // Nobody is left to tell when standard output is gone.
    let _ = std::io::stdout().lock().write_all(line.as_bytes());
}

/// Hands each line on.
struct Ecs<P>(P);

struct Fields(Map<String, Value>);

impl<S, P> Layer<S> for Ecs<P>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    P: Fn(&str) + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields(Map::new());
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut line = Fields(Map::new());
        for span in context.event_scope(event).into_iter().flat_map(Scope::from_root) {
            if let Some(Fields(fields)) = span.extensions().get::<Fields>() {
                // Spans of libraries have names of their own.
                let ours = fields.iter().filter(|(name, _)| name.starts_with("labels."));
                line.0
                    .extend(ours.map(|(name, value)| (name.clone(), value.clone())));
            }
        }
        event.record(&mut line);
        let metadata = event.metadata();
        line.set("@timestamp", Timestamp::now().to_string());
        line.set("ecs.version", "8.17");
        line.set("log.level", metadata.level().as_str().to_lowercase());
        line.set("log.logger", metadata.target());
        line.set("service.name", "exchange-operator");
        line.set("service.version", env!("CARGO_PKG_VERSION"));
        let mut text = Value::Object(line.0).to_string();
        text.push('\n');
        (self.0)(&text);
    }
}

impl Fields {
    fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field.name(), value);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing::{info, info_span, warn};

    use super::*;

    /// What is logged meanwhile, line by line.
    fn logged(work: impl FnOnce()) -> Vec<Value> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&lines);
        let layer = Ecs(move |line: &str| sink.lock().unwrap().push(line.to_owned()));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), work);
        let lines = lines.lock().unwrap();
        lines
            .iter()
            .map(|line| {
                assert_eq!(line.matches('\n').count(), 1, "{line:?} is not one line");
                serde_json::from_str(line).unwrap()
            })
            .collect()
    }

    #[test]
    fn each_line_is_an_object_with_the_names_that_log_stores_know() {
        let lines = logged(|| {
            let pass = info_span!("pass", labels.namespace = "prod", labels.name = "exchange");
            let _pass = pass.enter();
            let _other = info_span!("library", url = "/secret").entered();
            info!(labels.phase = "Live", count = 3, "Testing -> Live");
            warn!(error.message = "two\nlines", "it failed");
        });
        let expected = [
            ("/message", Value::from("Testing -> Live")),
            ("/log.level", "info".into()),
            ("/log.logger", "exchange_operator::telemetry::tests".into()),
            ("/service.name", "exchange-operator".into()),
            ("/labels.namespace", "prod".into()),
            ("/labels.name", "exchange".into()),
            ("/labels.phase", "Live".into()),
            ("/count", 3.into()),
        ];
        for (pointer, value) in expected {
            assert_eq!(lines[0].pointer(pointer), Some(&value), "{}", lines[0]);
        }
        assert!(lines[0].get("url").is_none(), "a span of somebody else's");
        let at = lines[0]["@timestamp"].as_str().unwrap();
        at.parse::<Timestamp>().unwrap();
        assert_eq!(lines[1]["error.message"], "two\nlines");
        assert_eq!(lines[1]["log.level"], "warn");
        assert_eq!(lines.len(), 2);
    }
}
