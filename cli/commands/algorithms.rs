//! `cluster algorithms`: what can be trained, from the same schema that validates job files.

use api::schema::{AlgorithmSchema, Direction, Hyperparameter, Kind};

use crate::args::{Algorithms, Global};
use crate::error::Result;
use crate::output;

/// Lists all algorithms, or describes one.
pub fn show(global: &Global, args: &Algorithms) -> Result<()> {
    if args.markdown {
        output::line(&markdown(&algorithms::algorithms()));
        return Ok(());
    }
    let Some(name) = &args.name else {
        let all = algorithms::algorithms();
        if global.json {
            all.iter().for_each(output::json);
            return Ok(());
        }
        let rows = all.iter().map(|a| vec![a.name.clone(), a.description.clone()]).collect();
        output::table(&["name", "description"], rows, "no algorithms");
        return Ok(());
    };
    let schema = algorithms::algorithm(name)?.schema();
    if global.json {
        output::json(&schema);
        return Ok(());
    }
    output::line(&format!("{}: {}", schema.name, schema.description));
    output::line("\n[channels]");
    let rows = schema
        .channels
        .iter()
        .map(|channel| {
            let need = if channel.required { "required" } else { "optional" };
            let types = channel.content_types.join(", ");
            vec![channel.name.clone(), need.into(), types, channel.description.clone()]
        })
        .collect();
    output::table(&["name", "", "content types", "description"], rows, "none");
    output::line("\n[hyperparameters]");
    let rows = schema
        .hyperparameters
        .iter()
        .map(|h| vec![h.name.clone(), range(h), h.default.to_string(), h.description.clone()])
        .collect();
    output::table(&["name", "values", "default", "description"], rows, "none");
    output::line("\nmetrics");
    let rows = schema
        .metrics
        .iter()
        .map(|metric| {
            vec![metric.name.clone(), better(metric.direction).into(), metric.description.clone()]
        })
        .collect();
    output::table(&["name", "", "description"], rows, "none");
    output::line(&format!("\nserves: {}", schema.request_types.join(", ")));
    Ok(())
}

fn range(parameter: &Hyperparameter) -> String {
    match &parameter.kind {
        Kind::Bool => "true, false".into(),
        Kind::Integer { min, max } => format!("{min} … {max}"),
        Kind::Float { min, max, .. } => format!("{min} … {max}"),
        Kind::Choice { options } => options.join(", "),
        Kind::Text => "text".into(),
    }
}

fn better(direction: Direction) -> &'static str {
    match direction {
        Direction::Minimize => "small is better",
        Direction::Maximize => "large is better",
    }
}

/// `docs/algorithms.md`: a test keeps the file equal to this.
fn markdown(schemas: &[AlgorithmSchema]) -> String {
    let mut text = String::from(
        "# Algorithms\n\nMade by `cluster algorithms --markdown` from the schemas that validate \
         job files.\n",
    );
    for schema in schemas {
        text += &format!("\n## {}\n\n{}\n", schema.name, schema.description);
        text += "\n| channel | | content types | |\n|---|---|---|---|\n";
        for channel in &schema.channels {
            let need = if channel.required { "required" } else { "optional" };
            let types = channel.content_types.join(", ");
            text +=
                &format!("| `{}` | {need} | {types} | {} |\n", channel.name, channel.description);
        }
        text += "\n| hyperparameter | values | default | |\n|---|---|---|---|\n";
        for h in &schema.hyperparameters {
            let (values, name) = (range(h), &h.name);
            text += &format!("| `{name}` | {values} | {} | {} |\n", h.default, h.description);
        }
        text += "\n| metric | | |\n|---|---|---|\n";
        for metric in &schema.metrics {
            let better = better(metric.direction);
            text += &format!("| `{}` | {better} | {} |\n", metric.name, metric.description);
        }
        text += &format!("\nServes: {}.\n", schema.request_types.join(", "));
    }
    text.truncate(text.trim_end().len());
    text
}
